from typing import Any

import pytest

from rec.schema import (
    ConfigError,
    DataConfig,
    Debias,
    DomainConfig,
    FeatureConfig,
    FeatureKind,
    TableConfig,
    TaskConfig,
    TaskKind,
    check_range,
    nearest,
)


def a_feature(kind: str, **more: Any) -> FeatureConfig:
    return FeatureConfig(kind=FeatureKind[kind], **more)


def a_data_set(**changes: Any) -> DataConfig:
    parts: dict[str, Any] = {
        "features": {
            "listing": a_feature("id"),
            "recent": a_feature("sequence", table="listing", column="recent_listings"),
            "price": a_feature("dense"),
            "text": a_feature("vector", size=3),
        },
        "tables": {"listing": TableConfig(num_embeddings=10)},
        "tasks": {"click": TaskConfig(label="clicked"), "purchase": TaskConfig(label="bought", condition="click")},
    }
    return DataConfig(name="small", path=".", **{**parts, **changes})


@pytest.mark.parametrize(
    ("name", "valid", "words"),
    [
        ("listng", ["query", "listing"], "did you mean 'listing'? valid: listing, query"),
        ("query", {"query", "user"}, "did you mean 'query'? valid: query, user"),
        ("zzz", ["query", "listing"], "valid: listing, query"),
        ("query", [], "valid: none"),
        ("", ["query"], "valid: query"),
    ],
)
def test_nearest_names_the_closest_and_all_that_is_valid(name: str, valid: list[str], words: str):
    assert nearest(name, valid) == words


def test_a_range_holds_its_ends_and_none():
    for value in (None, 0, 0.5, 1):
        check_range("a.key", value, 0, 1)
    for value in (-1e-9, 1.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"a.key is {value}, expected a value from 0 to 1"):
            check_range("a.key", value, 0, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: a_feature("id", dropout=1.1), ["dropout is 1.1", "0 to 1"]),
        (lambda: a_feature("id", dropout=-0.1), ["dropout is -0.1"]),
        (lambda: a_feature("bag", max_length=0), ["max_length is 0", "1 to"]),
        (lambda: a_feature("vector", size=0), ["size is 0"]),
        (lambda: TableConfig(num_embeddings=0), ["num_embeddings is 0", "1 to"]),
        (lambda: TableConfig(num_embeddings=1, embedding_dim=6), ["embedding_dim is 6", "multiple of 4"]),
        (lambda: TableConfig(num_embeddings=1, embedding_dim=0), ["embedding_dim is 0", "multiple of 4"]),
        (lambda: TaskConfig(label="y", loss_weight=-1), ["loss_weight is -1", "0 to"]),
        (lambda: DomainConfig(column="tab"), ["data.domain.names is []", "at least one"]),
        (lambda: DomainConfig(column="tab", names=["home", "home"]), ["'home', 'home'", "none twice"]),
        (lambda: a_data_set(features={}), ["'small' has 0 features", "at least one"]),
        (lambda: a_data_set(tasks={}), ["0 tasks", "at least one"]),
        (
            lambda: a_data_set(features={"listing": a_feature("id", table="listng")}),
            ["data.features.listing", "'listng'", "did you mean 'listing'"],
        ),
        (lambda: a_data_set(features={"lsting": a_feature("bag")}), ["data.features.lsting", "did you mean 'listing'"]),
        (
            lambda: a_data_set(features={"listing": a_feature("id"), "price": a_feature("dense", table="listing")}),
            ["data.features.price is dense", "table, hashed and dropout belong to id, bag and sequence"],
        ),
        (lambda: a_data_set(features={"text": a_feature("vector", hashed=True)}), ["data.features.text is vector"]),
        (
            lambda: a_data_set(
                features={"listing": a_feature("id", hashed=True), "recent": a_feature("sequence", table="listing")}
            ),
            [
                "data.features.recent.hashed is False and data.features.listing.hashed True",
                "both read table 'listing'",
                "alike",
            ],
        ),
        (lambda: a_data_set(features={"price": a_feature("dense", dropout=0.1)}), ["data.features.price is dense"]),
        (
            lambda: a_data_set(tables={n: TableConfig(num_embeddings=1) for n in ("listing", "shop", "query")}),
            ["data.tables ['query', 'shop']", "no feature reads them"],
        ),
        (
            lambda: a_data_set(tasks={"click": TaskConfig(label="y"), "buy": TaskConfig(label="z", condition="clik")}),
            ["data.tasks.buy.condition is 'clik'", "did you mean 'click'"],
        ),
        (
            lambda: a_data_set(tasks={"click": TaskConfig(label="y", condition="click")}),
            ["data.tasks.click.condition is 'click'", "another task", "valid: none"],
        ),
    ],
)
def test_what_cannot_be_run_is_named_with_its_remedy(make: Any, words: list[str]):
    with pytest.raises(ConfigError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_a_data_set_knows_its_columns_tables_and_widths():
    data = a_data_set()
    assert list(data.sparse_features) == ["listing", "recent"]
    assert list(data.dense_features) == ["price", "text"]
    assert data.num_dense == 1 + 3
    assert [data.table_of(name) for name in data.sparse_features] == ["listing", "listing"]
    assert [data.column_of(name) for name in data.features] == ["listing", "recent_listings", "price", "text"]
    assert data.domains == ["all"]
    assert a_data_set(domain=DomainConfig(column="tab", names=["home", "search"])).domains == ["home", "search"]


def test_learn_chooses_tasks_and_their_order() -> None:
    tasks = {name: TaskConfig(label=name) for name in ("click", "cart", "buy")}
    assert list(with_tasks(tasks=tasks, learn=["buy", "click"]).tasks) == ["buy", "click"]
    for learn, said in (
        (["buy", "clik"], "data.learn names task 'clik'; did you mean 'click'"),
        ([], r"data.learn is \[\]"),
        (["buy", "buy"], "none twice"),
    ):
        with pytest.raises(ConfigError, match=said):
            with_tasks(tasks=tasks, learn=learn)
    tasks["buy"] = TaskConfig(label="buy", condition="click")
    with pytest.raises(ConfigError, match="data.tasks.buy.condition is 'click', expected another task"):
        with_tasks(tasks=tasks, learn=["buy"])


def with_tasks(**parts: Any) -> DataConfig:
    return DataConfig(name="x", path="x", features={"a": FeatureConfig(kind=FeatureKind.dense)}, **parts)


DOMAIN = DomainConfig(column="tab", names=["home", "search"])
CLICK = TaskConfig(label="click")


def a_task(**settings: Any) -> TaskConfig:
    return TaskConfig(label="buy", **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"kind": TaskKind.regression, "teacher": True},
            "is a regression: .* teacher, at_most and debias belong to binary",
        ),
        ({"kind": TaskKind.regression, "at_most": "click"}, "is a regression"),
        ({"kind": TaskKind.regression, "condition": "click", "debias": Debias.ips}, "is a regression"),
        ({"align": 0.5}, "has align 0.5 and no teacher"),
        ({"teacher": True, "positive_weight": 2.0}, "has a teacher.*positive_weight"),
        ({"teacher": True, "product": "click", "debias": Debias.dr}, "has a teacher.*debias none"),
        ({"debias": Debias.ips}, "has debias ips, which needs a condition or a product"),
        ({"debias": Debias.dr, "product": "click", "via": "cart"}, "has debias dr, .* no via"),
        ({"align": -1.0, "teacher": True}, "align is -1"),
        ({"at_most_weight": -1.0}, "at_most_weight is -1"),
        ({"debias_weight": -1.0}, "debias_weight is -1"),
        ({"propensity_floor": 0.0}, "propensity_floor is 0"),
        ({"propensity_floor": 1.1}, "propensity_floor is 1.1"),
    ],
)
def test_what_one_task_cannot_be_asked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        a_task(**settings)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ({"buy": a_task(domains=["hom"])}, "data.tasks.buy.domains has 'hom'; data.domain.names: did you mean 'home'"),
        ({"buy": a_task(domains=[])}, r"data.tasks.buy.domains is \[\], expected at least one"),
        ({"buy": a_task(domains=["home", "home"])}, "none twice"),
        ({"buy": a_task(at_most="clik"), "click": CLICK}, "buy.at_most is 'clik', .* did you mean 'click'"),
        ({"buy": a_task(at_most="buy")}, "buy.at_most is 'buy', expected another binary task"),
        (
            {"buy": a_task(at_most="dwell"), "dwell": TaskConfig(label="d", kind=TaskKind.regression)},
            "buy.at_most is 'dwell', expected another binary task",
        ),
        (
            {
                "buy": a_task(condition="dwell", debias=Debias.ips),
                "dwell": TaskConfig(label="d", kind=TaskKind.regression),
            },
            "buy.condition is 'dwell', expected another binary task",
        ),
        (
            {
                "buy": a_task(condition="click", debias=Debias.ips),
                "click": TaskConfig(label="click", negatives_kept=0.5),
            },
            "buy has debias ips, whose propensity is .* must be 1 on it and on click",
        ),
        (
            {"buy": a_task(condition="click", debias=Debias.dr, positive_weight=2.0), "click": CLICK},
            "must be 1 on it and on click",
        ),
        (
            {"buy": a_task(condition="click", debias=Debias.dr, domains=["home"]), "click": CLICK},
            "buy has debias dr .* give both the same",
        ),
    ],
)
def test_what_tasks_cannot_be_asked_together(tasks: dict[str, TaskConfig], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        with_tasks(tasks=tasks, domain=DOMAIN)


def test_domains_of_a_task_need_domains() -> None:
    with pytest.raises(ConfigError, match="data.tasks.buy.domains has 'home'; data.domain.names: valid: none"):
        with_tasks(tasks={"buy": a_task(domains=["home"])})


def test_tasks_that_can_be_asked_together() -> None:
    home = {"domains": ["home", "search"]}
    tasks = {
        "click": TaskConfig(label="click", domains=["search", "home"]),
        "buy": a_task(condition="click", debias=Debias.dr, at_most="click", **home),
        "pay": a_task(product="click", debias=Debias.ips, **home),
        "ctr": TaskConfig(label="p", teacher=True, align=1.0, domains=["search"]),
    }
    assert list(with_tasks(tasks=tasks, domain=DOMAIN).tasks) == list(tasks)
    assert [task.given for task in tasks.values()] == [None, "click", "click", None]


def test_truth_columns() -> None:
    assert a_task().truth_columns == []
    assert a_task(truth="true_click").truth_columns == ["true_click"]
    assert a_task(truth="true_click *  a*b").truth_columns == ["true_click", "a*b"]
