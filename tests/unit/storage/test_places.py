"""Where a registered model's files are, by the JSON of the archived stack and URIs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmcore.errors import LoadFailed
from mmcore.model import ModelInfo
from mmcore.storage.places import StorageConfig, parse_uri, stated_format

MINIO = {
    "type": "s3", "access_key_id": "AKIA", "secret_access_key": "SECRET/of/minio", "endpoint_url": "http://minio:9000",
    "bucket": "modelmesh-example-models", "region": "us-south",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "storage-config"
    made.mkdir()
    (made / "localMinIO").write_text(json.dumps(MINIO))
    (made / "site").write_text(json.dumps({"type": "http", "url": "https://x", "headers": {"A": "1", "B": ["2"]}}))
    return made


def info(path: str = "sklearn/mnist.joblib", **key: Any) -> ModelInfo:
    return ModelInfo("mt:sklearn", path, json.dumps(key))


def test_entry_named_by_the_key_gives_the_parameters(folder: Path) -> None:
    place = StorageConfig(folder).place(info(storage_key="localMinIO", schema_path="s.json", disk_size_bytes=5))
    assert (place.type, place.path, place.schema_path) == ("s3", "sklearn/mnist.joblib", "s.json")
    assert place.parameters == {name: value for name, value in MINIO.items() if name != "type"}


def test_parameters_lie_over_the_entry_by_dots(folder: Path) -> None:
    config = StorageConfig(folder)
    place = config.place(info(storage_key="localMinIO", storage_params={"bucket": "other", "a.b": "c"}))
    assert (place.parameters["bucket"], place.parameters["a"]) == ("other", {"b": "c"})
    place = config.place(info(storage_key="site", storage_params={"headers.A": "3"}))
    assert place.parameters["headers"] == {"A": "3", "B": ["2"]}


@pytest.mark.parametrize(
    "params", [{"headers.B": "x"}, {"headers.B.c": "x"}, {"headers": "x"}, {"url.a": "x"}, {"n": 5}]
)
def test_parameters_replace_texts_alone(folder: Path, params: dict[str, Any]) -> None:
    with pytest.raises(LoadFailed, match="the storage parameter"):
        StorageConfig(folder).place(info(storage_key="site", storage_params=params))


def test_default_entries_serve_models_without_a_key(folder: Path) -> None:
    config = StorageConfig(folder)
    with pytest.raises(LoadFailed, match="no storage entry 'default'"):
        config.place(info())
    (folder / "default").write_text(json.dumps({"type": "pvc", "name": "claim"}))
    (folder / "default_s3").write_text(json.dumps(MINIO))
    assert config.place(info()).type == "pvc"
    assert config.place(info(storage_params={"type": "s3"})).parameters["region"] == "us-south"
    # Without such a default the parameters alone must do.
    place = config.place(info(storage_params={"type": "gcs", "bucket": "b"}))
    assert (place.type, place.parameters) == ("gcs", {"bucket": "b"})


def test_unknown_key_names_those_that_are_known(folder: Path) -> None:
    with pytest.raises(LoadFailed, match="no storage entry 'nope'; known are: localMinIO, site"):
        StorageConfig(folder).place(info(storage_key="nope"))
    with pytest.raises(LoadFailed, match="known are: none"):
        StorageConfig(None).place(info(storage_key="nope"))


@pytest.mark.parametrize("name", ["../localMinIO", "..data", "a/b", "/etc/passwd", "a\0b"])
def test_key_cannot_leave_the_folder(folder: Path, name: str) -> None:
    with pytest.raises(LoadFailed, match="cannot be the name of a storage entry"):
        StorageConfig(folder).place(info(storage_key=name))


def test_old_bucket_in_the_key_counts_only_where_the_entry_has_one(folder: Path) -> None:
    config = StorageConfig(folder)
    assert config.place(info(storage_key="localMinIO", bucket="old")).parameters["bucket"] == "old"
    assert "bucket" not in config.place(info(storage_key="site", bucket="old")).parameters


def test_change_of_the_mounted_secret_is_seen_at_the_next_pull(tmp_path: Path) -> None:
    """As Kubernetes does it: files are links through ``..data``, which is switched to a new folder in one step."""
    mount = tmp_path / "mount"
    for number in (1, 2):
        (mount / f"..{number}").mkdir(parents=True)
        (mount / f"..{number}" / "store").write_text(json.dumps({**MINIO, "access_key_id": f"key-{number}"}))
    (mount / "..data").symlink_to("..1")
    (mount / "store").symlink_to("..data/store")
    config = StorageConfig(mount)
    assert config.names() == ["store"]
    assert config.place(info(storage_key="store")).parameters["access_key_id"] == "key-1"
    (mount / "..new").symlink_to("..2")
    (mount / "..new").replace(mount / "..data")
    assert config.place(info(storage_key="store")).parameters["access_key_id"] == "key-2"


@pytest.mark.parametrize(
    ("uri", "expected", "path"),
    [
        ("s3://bucket/a/b.onnx", {"type": "s3", "bucket": "bucket"}, "a/b.onnx"),
        ("gs://bucket/a", {"type": "gcs", "bucket": "bucket"}, "a"),
        ("pvc://claim/a/b", {"type": "pvc", "name": "claim"}, "a/b"),
        (
            "https://acct.blob.core.windows.net/box/a/b",
            {"type": "azure", "account_name": "acct", "container": "box"},
            "a/b",
        ),
        ("https://host:8443/a/b.bin?token=1", {"type": "http", "url": "https://host:8443?token=1"}, "a/b.bin"),
        ("http://host/a%20b", {"type": "http", "url": "http://host"}, "a b"),
        ("file:///srv/m", {"type": "local"}, "/srv/m"),
    ],
)
def test_uri_forms(uri: str, expected: dict[str, str], path: str) -> None:
    assert parse_uri(uri) == (expected, path)


@pytest.mark.parametrize("uri", ["hdfs://host/a", "s3:///a", "pvc:///a", "file://host/a", "https:///a"])
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(LoadFailed):
        parse_uri(uri)


def test_uri_goes_before_parameters_and_takes_its_types_default(folder: Path) -> None:
    (folder / "default_s3").write_text(json.dumps(MINIO))
    place = StorageConfig(folder).place(info("s3://mine/a", storage_params={"bucket": "other", "region": "x"}))
    assert place.path == "a"
    assert place.parameters == {**{k: v for k, v in MINIO.items() if k != "type"}, "bucket": "mine", "region": "x"}


def test_absolute_path_without_any_storage_is_local() -> None:
    assert StorageConfig(None).place(ModelInfo("sklearn", "/srv/m")).type == "local"


@pytest.mark.parametrize("key", ["{", "[]", '{"storage_params": 3}', '{"schema_path": 1}', '{"storage_key": {}}'])
def test_wrong_keys_are_refused(key: str) -> None:
    with pytest.raises(LoadFailed, match="the model's key"):
        StorageConfig(None).place(ModelInfo("sklearn", "/srv/m", key))


@pytest.mark.parametrize(
    ("type_", "key", "expected"),
    [
        ("mt:sklearn", "", "sklearn"),
        ("mt:sklearn:1.0|pv:grpc-v2", "", "sklearn"),
        ("mt:pytorch:1", "", "torchscript"),
        ("ONNX", "", "onnx"),
        ("rt:mlserver-1.x", "", None),
        ("rt:mlserver-1.x", '{"model_type": {"name": "LightGBM", "version": "3"}}', "lightgbm"),
        ("x", '{"model_type": "xgboost:1"}', "xgboost"),
        ("", "", None),
    ],
)
def test_format_of_a_registered_model(type_: str, key: str, expected: str | None) -> None:
    assert stated_format(ModelInfo(type_, "p", key)) == expected


def test_no_text_shows_what_an_entry_holds(folder: Path) -> None:
    config = StorageConfig(folder)
    assert "SECRET" not in repr(config.place(info(storage_key="localMinIO", storage_params={"session_token": "TOKEN"})))
    (folder / "broken").write_text('{"type": "s3", "secret_access_key": "SECRET"')
    (folder / "list").write_text('["SECRET"]')
    for name in ("broken", "list"):
        with pytest.raises(LoadFailed) as raised:
            config.place(info(storage_key=name))
        assert "SECRET" not in repr(raised.value)
        assert raised.value.__cause__ is None


def test_models_neither_take_the_identity_of_the_machine_nor_say_where_its_tokens_go(folder: Path) -> None:
    entry = {"type": "azure", "account_name": "acct", "container": "models", "credentials": "managed-identity"}
    (folder / "default_azure").write_text(json.dumps(entry))
    config = StorageConfig(folder)
    assert config.place(info("https://acct.blob.core.windows.net/other/m")).parameters["container"] == "other"
    for params in ({"endpoint_url": "https://mine.example"}, {"client_id": "another"}, {"account_name": "mine"}):
        with pytest.raises(LoadFailed, match="cannot be changed by a model"):
            config.place(info("m", storage_params={"type": "azure", **params}))
    with pytest.raises(LoadFailed, match="'account_name' cannot be changed by a model"):
        config.place(info("https://mine.blob.core.windows.net/other/m"))
    with pytest.raises(LoadFailed, match="can be said in a storage entry alone"):
        config.place(info("m", storage_params={"type": "gcs", "credentials": "default"}))
    # Who pulls for themselves says what they like.
    own = StorageConfig(None, own_parameters=True)
    assert own.place(info("m", storage_params={"type": "gcs", "credentials": "default"})).parameters == {
        "credentials": "default"
    }
