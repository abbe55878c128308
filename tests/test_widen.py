import pytest

from rec.config import compose
from rec.schema import ConfigError
from rec.widen import closest_width, dense_parameters, main, widened


def test_counts_what_the_equations_say() -> None:
    """The MMoE paper's: 100 inputs, 8 experts of 16, gates, towers of 8; here with biases."""
    config = compose(
        [
            "interaction=none",
            "experts=mmoe",
            "model.experts.num_experts=8",
            "model.experts.layer_sizes=[16]",
            "model.towers.layer_sizes=[8]",
        ]
    )
    width = (
        sum(config.data.tables[config.data.table_of(n)].embedding_dim for n in config.data.sparse_features)
        + config.data.num_dense
    )
    tasks = 3
    experts, gates, towers = 8 * 16 * (width + 1), tasks * 8 * (width + 1), tasks * (8 * 17 + 9)
    assert dense_parameters(config) == experts + gates + towers


@pytest.mark.parametrize("target", [1, 5, 99, 100, 101, 10**6])
def test_closest_width_is_the_closest(target: int) -> None:
    def count(width: int) -> int:
        return 3 * width * width + 7 * width

    found = closest_width(count, target)
    assert abs(count(found) - target) == min(abs(count(width) - target) for width in range(1, 700))


@pytest.mark.parametrize("experts", ["shared_bottom", "mmoe", "ple", "mixed"])
@pytest.mark.parametrize("sizes", ["[64,32]", "[48]"])
def test_brings_any_architecture_to_any_size(experts: str, sizes: str) -> None:
    config = compose([f"experts={experts}", f"model.experts.layer_sizes={sizes}", "interaction=none"])
    before = list(config.model.experts.layer_sizes)
    found = widened(config, target=400_000)
    assert config.model.experts.layer_sizes == before  # what was asked about is left as it was
    assert len(found) == len(before) and (len(found) == 1 or found[-1] == before[-1])
    config.model.experts.layer_sizes = found
    assert dense_parameters(config) == pytest.approx(400_000, rel=0.01)


def test_says_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    main(["experiment=etsy_shared_bottom", "model.experts.layer_sizes=[8,64]", "--like", "experiment=etsy_mmoe"])
    said = capsys.readouterr().out
    assert (
        f"model.experts.layer_sizes={compose(['experiment=etsy_shared_bottom']).model.experts.layer_sizes}".replace(
            " ", ""
        )
        in said
    )


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected at most 10"):
        widened(compose(["experts=shared_bottom"]), target=10)
    with pytest.raises(SystemExit, match="error: no experiment 'nope'"):
        main(["experiment=nope", "--like", "experiment=etsy_mmoe"])
