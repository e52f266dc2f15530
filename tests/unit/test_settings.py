"""Where settings come from, which goes first, and what is said of those that can't be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mqinfer import tensor_codec
from mqinfer.errors import SettingsError
from mqinfer.settings import (
    AutoscalerSettings,
    BatchSettings,
    CoordinatorSettings,
    Settings,
    WorkerSettings,
    load,
    otlp_variable,
    parse_bytes,
    parse_limits,
    parse_seconds,
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("MQINFER_", "OTEL_")) or name == "CREDENTIALS_DIRECTORY":
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mqinfer.toml"
    path.write_text('broker = "amqp://file/"\ndevice = "cuda:1"\nrows = 7\nkv_bytes = "2GiB"\n')
    return path


def test_a_flag_goes_before_the_environment_and_that_before_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(Settings).broker == "amqp://guest:guest@localhost:5672/"
    assert load(Settings, file=file).broker == "amqp://file/"
    monkeypatch.setenv("MQINFER_BROKER", "amqp://environment/")
    assert load(Settings, file=file).broker == "amqp://environment/"
    assert load(Settings, file=file, broker="amqp://flag/").broker == "amqp://flag/"


def test_a_flag_that_was_not_given_hides_nothing(file: Path) -> None:
    assert load(WorkerSettings, file=file, device=None).device == "cuda:1"


def test_an_empty_variable_is_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQINFER_THREADS", "")
    assert load(WorkerSettings).threads == 0


def test_actors_share_a_file_and_take_their_own_keys(file: Path) -> None:
    assert load(WorkerSettings, file=file).kv_bytes == 2 * 2**30
    assert load(CoordinatorSettings, file=file).rows == 7


def test_it_can_be_seen_whether_a_setting_was_given(file: Path) -> None:
    assert "broker" not in load(Settings).model_fields_set
    assert "broker" in load(Settings, file=file).model_fields_set


def test_one_file_does_not_linger_in_the_next_settings(file: Path) -> None:
    load(WorkerSettings, file=file)
    assert load(WorkerSettings).device == "cpu"


def test_a_key_that_no_actor_has_is_refused_and_the_nearest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text("kv_byte = 1\n")
    with pytest.raises(SettingsError, match=r"s\.toml: unknown key 'kv_byte', is it 'kv_bytes'\?"):
        load(Settings, file=path)
    path.write_text("quux = 1\n")
    with pytest.raises(SettingsError, match=r"unknown key 'quux'$"):
        load(Settings, file=path)


@pytest.mark.parametrize("content", [b"rows = [", b"\xff"])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"s\.toml is not TOML"):
        load(Settings, file=path)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml: No such file"):
        load(Settings, file=tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [
        (WorkerSettings, "kv_bytes", "4Gxx", "write a size such as 4GiB or 512MiB"),
        (WorkerSettings, "kv_bytes", "0", "greater than 0"),
        (WorkerSettings, "kv_bytes", "-1GiB", "write a size"),
        (WorkerSettings, "codec", "zip", "'lossless'"),
        (WorkerSettings, "threads", "many", "integer"),
        (CoordinatorSettings, "rows", "0", "greater than or equal to 1"),
        (BatchSettings, "temperature", "3", "less than or equal to 2"),
        (Settings, "log_level", "loud", "'warning'"),
    ],
)
def test_a_value_that_can_not_be_used_is_refused_by_its_name(
    kind: type[Settings], name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"MQINFER_{name.upper()}", value)
    with pytest.raises(SettingsError) as caught:
        load(kind)
    assert str(caught.value).startswith(f"setting {name}: ")
    assert words in str(caught.value)
    assert f"(flag, MQINFER_{name.upper()} or file)" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("10b", 10),
        ("1KiB", 1024),
        ("1.5 mib", 3 * 2**19),
        ("4GiB", 2**32),
        ("2TiB", 2**41),
        ("3GB", 3 * 10**9),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_a_size_beyond_all_floats_is_still_a_number() -> None:
    assert parse_bytes("9" * 400) > 2**1000


@pytest.mark.parametrize("text", ["", "GiB", "1 2", "1.GiB", "1e9", "٣GiB", "1GiBs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write a size"):
        parse_bytes(text)


def test_a_log_level_may_be_written_large() -> None:
    assert load(Settings, log_level="DEBUG").log_level == "debug"


def test_a_batch_job_is_quiet_unless_it_is_told_otherwise(file: Path) -> None:
    assert load(Settings).log_level == "info"
    assert load(BatchSettings).log_level == "warning"
    assert load(BatchSettings, log_level="info").log_level == "info"


def test_every_codec_of_the_settings_can_pack_and_none_is_missing() -> None:
    choices = {"auto", *tensor_codec.CODECS}
    assert set(WorkerSettings.model_fields["codec"].annotation.__args__) == choices  # type: ignore[union-attr]


def test_settings_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(Settings).broker = "amqp://other/"  # type: ignore[misc]


SECRET = "amqp://user:pass-word-7f3a@host/"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    return path


@pytest.fixture
def credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As systemd's LoadCredential=broker:… hands it over."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    (folder / "broker").write_text("amqp://credential/")
    return folder / "broker"


def test_the_broker_may_stand_in_a_file_of_its_own(
    secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(f'broker = "@{secret}"\n')
    assert load(Settings, broker=f"@{secret}").broker == SECRET
    assert load(Settings, file=settings).broker == SECRET
    assert "broker" in load(Settings, file=settings).model_fields_set
    monkeypatch.setenv("MQINFER_BROKER", f"@{secret}")
    assert load(Settings).broker == SECRET


def test_a_credential_of_systemd_goes_after_the_environment_and_before_the_file(
    credential: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(Settings, file=file).broker == "amqp://credential/"
    monkeypatch.setenv("MQINFER_BROKER", "amqp://environment/")
    assert load(Settings, file=file).broker == "amqp://environment/"


def test_credentials_of_another_kind_change_nothing(credential: Path, file: Path) -> None:
    credential.rename(credential.with_name("other"))
    assert load(Settings, file=file).broker == "amqp://file/"


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"pass-word-7f3a x\n", b"pass-word-7f3a\nx\n", b"\xffpass-word-7f3a", b"pass-word-7f3a" * 400],
)
def test_a_file_that_holds_no_url_is_refused_without_quoting_it(secret: Path, content: bytes) -> None:
    secret.write_bytes(content)
    with pytest.raises(SettingsError) as refused:
        load(Settings, broker=f"@{secret}")
    assert str(secret) in str(refused.value)
    assert "pass-word" not in str(refused.value)


def test_a_file_for_the_broker_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere: No such file"):
        load(Settings, broker=f"@{tmp_path}/nowhere")


def test_settings_that_are_printed_do_not_show_the_broker(secret: Path) -> None:
    assert "pass-word" not in repr(load(Settings, broker=f"@{secret}")) + str(load(Settings, broker=SECRET))


@pytest.mark.parametrize(("text", "seconds"), [("10s", 10), ("0.5", 0.5), (" 2 M ", 120), ("1h", 3600), ("7", 7)])
def test_times_are_read_with_their_units(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "10x", "-1s", "1m30s", "nan"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write a time such as 10s"):
        parse_seconds(text)


@pytest.mark.parametrize("value", ["0", "9" * 400, float("inf")])
def test_a_time_that_nobody_could_wait_is_refused(value: object) -> None:
    with pytest.raises(SettingsError, match="setting window_s"):
        load(AutoscalerSettings, window_s=value)


def test_limits_are_read_by_stage() -> None:
    assert parse_limits("2=1:8, 3=0:2") == {2: (1, 8), 3: (0, 2)}
    assert parse_limits(["2=1:8"]) == {2: (1, 8)}
    assert parse_limits({2: (1, 8)}) == {2: (1, 8)}


@pytest.mark.parametrize("text", ["2", "2=1", "2=a:b", "=1:2", "2=1:2;3=1:2"])
def test_what_are_no_limits_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="STAGE=LEAST:MOST"):
        parse_limits(text)


def test_limits_in_a_file_may_be_a_table(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text("limits = {2 = [1, 8]}\nhosts = ['a', 'b']\n")
    settings = load(AutoscalerSettings, file=tmp_path / "s.toml")
    assert (settings.limits, settings.hosts) == ({2: (1, 8)}, ("a", "b"))


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_opentelemetry_s_own_variables_say_whether_spans_are_sent(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert otlp_variable() == ""
    monkeypatch.setenv(name, "")
    assert otlp_variable() == ""
    monkeypatch.setenv(name, "http://collector:4318")
    assert otlp_variable() == name


@pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "True"), ("OTEL_TRACES_EXPORTER", "none")])
def test_opentelemetry_s_own_switches_switch_it_off(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    monkeypatch.setenv(name, value)
    assert otlp_variable() == ""


@pytest.mark.parametrize("address", ["collector:4318", "http://", "http:///v1/traces", "grpc://collector:4317", " "])
def test_spans_are_not_sent_to_what_is_no_address(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_ENDPOINT: write an address such as http"):
        otlp_variable()
