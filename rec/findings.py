"""What was looked at, what is wrong with it and what helps: the report of `python -m rec.doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and, where it is wrong, the problem and its remedy."""

    name: str
    value: str
    problem: str | None = None  # a line a problem; None: it is as it should be
    remedy: str = ""  # empty where the problem says it


def render(findings: list[Finding]) -> str:
    """The report: a line a finding, then each problem with its remedy.

    >>> print(render([Finding("torch", "2.13.0"), Finding("hydra-core", "1.1", "hydra-core is 1.1", "reinstall")]))
        torch       2.13.0
      ! hydra-core  1.1
    <BLANKLINE>
    1 problem:
      hydra-core is 1.1
        remedy: reinstall
    """
    width = max(len(f.name) for f in findings)
    lines = [f"  {'!' if f.problem else ' '} {f.name:{width}}  {f.value}" for f in findings]
    count = sum(len(f.problem.splitlines()) for f in findings if f.problem)
    if not count:
        return "\n".join([*lines, "", "all is well"])
    lines += ["", f"{count} problem{'s' if count > 1 else ''}:"]
    for finding in findings:
        if finding.problem:
            lines += [f"  {line}" for line in finding.problem.splitlines()]
            lines += [f"    remedy: {finding.remedy}"] if finding.remedy else []
    return "\n".join(lines)
