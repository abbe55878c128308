from typing import Any

import pytest

from rec.schema import (
    ConfigError,
    DataConfig,
    DomainConfig,
    FeatureConfig,
    FeatureKind,
    TableConfig,
    TaskConfig,
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
