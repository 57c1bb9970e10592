"""The settings as the person who starts the service meets them: sources, units, mistakes, help."""

import contextlib
import dataclasses
import io
import subprocess
import sys
from collections.abc import Mapping, Sequence
from ipaddress import ip_network
from pathlib import Path

import pytest

import config
from config import OPTIONS, Config, ConfigError, Option, load

ROOT = Path(config.__file__).parent
EACH_OPTION = pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.name)


def toml(folder: Path, text: str) -> str:
    file = folder / "sluice.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def refusal(argv: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> str:
    """Return the message of the ConfigError, after checking that it is one line without a trace."""
    with pytest.raises(ConfigError) as caught:
        load(argv, environ or {})
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    assert caught.value.__cause__ is None
    return message


def help_text() -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as caught:
        load(["--help"], {})
    assert caught.value.code == 0
    return " ".join(out.getvalue().split())


def test_without_any_source_the_defaults_hold() -> None:
    """Nothing given means the defaults of the dataclass."""
    assert load([], {"PATH": "/bin"}) == Config()


def test_command_line_wins_over_environment_over_file(tmp_path: Path) -> None:
    """Each stronger source replaces the weaker ones, field by field."""
    file = toml(tmp_path, "port = 1\nslots = 1\nmax_queued = 1\n")
    found = load(
        ["--config", file, "--port=3"],
        {"SLUICE_PORT": "2", "SLUICE_SLOTS": "2"},
    )
    assert (found.port, found.slots, found.max_queued) == (3, 2, 1)
    assert found.max_sockets == Config().max_sockets


def test_the_file_can_be_named_by_the_environment(tmp_path: Path) -> None:
    """SLUICE_CONFIG names the file, and --config names another one instead."""
    (tmp_path / "other").mkdir()
    named = toml(tmp_path, "port = 1")
    other = toml(tmp_path / "other", "port = 2")
    assert load([], {"SLUICE_CONFIG": named}).port == 1
    assert load(["--config", other], {"SLUICE_CONFIG": named}).port == 2


@EACH_OPTION
def test_each_default_can_be_written_back(option: Option) -> None:
    """The default that help and docs show is accepted by the flag and by the variable."""
    assert load([option.flag, option.shown_default], {}) == Config()
    assert load([], {option.variable: option.shown_default}) == Config()


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("1kB", 1000),
        ("2MB", 2 * 10**6),
        ("3GB", 3 * 10**9),
        ("4TB", 4 * 10**12),
        ("1KiB", 1 << 10),
        ("2MiB", 2 << 20),
        ("3 GiB", 3 << 30),
        ("1024TiB", 1 << 50),
    ],
)
def test_sizes_take_suffixes(text: str, size_bytes: int, tmp_path: Path) -> None:
    """A size is bytes, or a number with a decimal or binary suffix, in every source."""
    file = toml(tmp_path, f'max_upload_bytes = "{text}"')
    assert load(["--max-upload-bytes", text], {}).max_upload_bytes == size_bytes
    assert load([], {"SLUICE_MAX_UPLOAD_BYTES": text}).max_upload_bytes == size_bytes
    assert load(["--config", file], {}).max_upload_bytes == size_bytes


@pytest.mark.parametrize(
    ("text", "time_s"),
    [("0", 0), ("2", 2), ("0.5", 0.5), ("250ms", 0.25), ("3s", 3), ("1.5m", 90), ("2 h", 7200)],
)
def test_durations_take_suffixes(text: str, time_s: float) -> None:
    """A duration is seconds, or a number with ms, s, m, h or d."""
    assert load(["--warm-s", text], {}).warm_s == pytest.approx(time_s)


def test_a_file_gives_numbers_lists_and_tables(tmp_path: Path) -> None:
    """TOML values keep their own types."""
    file = toml(
        tmp_path,
        'data = "/srv/sluice"\nwarm_s = 1.5\nchunk_bytes = 4096\nhosts = ["A.example", "::1"]\n'
        "[default_params]\nsteps = 5\n",
    )
    assert load(["--config", file], {}) == Config(
        data=Path("/srv/sluice"),
        warm_s=1.5,
        chunk_bytes=4096,
        hosts=("a.example", "::1"),
        default_params={"steps": 5},
    )


def test_numbers_by_kind(tmp_path: Path) -> None:
    """A table in the file, JSON elsewhere; each number is read as one of its own."""
    file = toml(tmp_path, "kind_limits = {fetch = 2}\nrun_timeouts_s = {exec = 1.5, fetch = 60}")
    found = load(["--config", file, "--stall-timeouts-s", '{"exec": 30}'], {})
    assert found.kind_limits == {"fetch": 2}
    assert found.run_timeouts_s == {"exec": 1.5, "fetch": 60.0}
    assert found.stall_timeouts_s == {"exec": 30.0}


def test_hosts_can_be_repeated_or_separated_by_commas() -> None:
    """Host names add up within one source, lower case and without duplicates."""
    argv = ["--hosts", "a.example,B.example", "--hosts", "[2001:DB8::1]", "--hosts", "a.example"]
    assert load(argv, {}).hosts == ("a.example", "b.example", "2001:db8::1")


def test_origins_are_kept_as_browsers_write_them(tmp_path: Path) -> None:
    """An origin is lower case, without the usual port, and * stands alone."""
    argv = ["--cors-origins", "HTTPS://App.Example:443,http://a.example:80", "--cors-origins="]
    argv += ["--cors-origins", "https://app.example", "--cors-origins", "http://[0:0::1]:443"]
    assert load(argv, {}).cors_origins == (
        *("https://app.example", "http://a.example", "http://[::1]:443"),
    )
    file = toml(tmp_path, 'cors_origins = ["*"]\n')
    assert load(["--config", file], {}).cors_origins == ("*",)


def test_proxies_are_addresses_or_networks() -> None:
    """A single address is the smallest network, of either family."""
    found = load([], {"SLUICE_TRUSTED_PROXIES": "127.0.0.1, 10.0.0.0/8,2001:DB8::/32"})
    assert found.trusted_proxies == (
        *(ip_network("127.0.0.1/32"), ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")),
    )


def test_places_are_networks_or_names() -> None:
    """What has the form of an address is one; the rest are host names, and nothing else."""
    found = load(["--fetch-allow", "10.0.0.0/8,[::1],Wiki.internal", "--fetch-allow=::1"], {})
    assert found.fetch_allow == ("10.0.0.0/8", "::1", "wiki.internal", "::1/128")
    for wrong in ("10.0.0.1/8", "http://a.example", "a.example:80"):
        with pytest.raises(ConfigError, match="fetch-allow"):
            load(["--fetch-allow", wrong], {})


def test_kinds_are_files_and_folders_that_exist(tmp_path: Path) -> None:
    """Paths add up within one source, without duplicates; one that is missing stops the start."""
    (tmp_path / "words.py").touch()
    words, folder = tmp_path / "words.py", tmp_path
    argv = ["--kinds", f"{words},{folder}", "--kinds", str(words)]
    assert load(argv, {}).kinds == (words, folder)
    assert load([], {"SLUICE_KINDS": str(folder)}).kinds == (folder,)
    file = toml(tmp_path, f'kinds = ["{words}"]')
    assert load(["--config", file], {}).kinds == (words,)
    assert "each must exist" in refusal(["--kinds", "nothing-there"])
    assert "each must exist" in refusal(["--kinds", file])


def test_the_settings_cannot_be_changed() -> None:
    """Nobody changes a setting behind the back of those who have read it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--address", "example.com"),
        ("--address", "1.2.3"),
        ("--port", "65536"),
        ("--port", "-1"),
        ("--port", "80.0"),
        ("--port", "٨٠"),
        ("--port", "9" * 5000),
        ("--data", ""),
        ("--durability", "sometimes"),
        ("--slots", "0"),
        ("--max-upload-bytes", "1 XiB"),
        ("--max-upload-bytes", "1KB"),
        ("--max-upload-bytes", "-1"),
        ("--max-json-bytes", "1TiB"),
        ("--chunk-bytes", "4194305"),
        ("--warm-s", "nan"),
        ("--warm-s", "inf"),
        ("--warm-s", "1w"),
        ("--body-idle-s", "0"),
        ("--kinds", "nothing-there.py"),
        ("--default-kind", "../count"),
        ("--default-params", "[1]"),
        ("--default-params", "{"),
        ("--default-params", '{"a": NaN}'),
        ("--default-params", "[" * 100_000),
        ("--hosts", "a.example:80"),
        ("--hosts", "http://a.example"),
        ("--hosts", "*"),
        *(("--cors-origins", text) for text in ("app.example", "https://app.example/", "null")),
        *(("--cors-origins", text) for text in ("*,https://a.example", "https://*.example")),
        *(("--cors-origins", text) for text in ("ftp://a.example", "https://u@a.example")),
        *(("--cors-origins", text) for text in ("https://a:0", "https://a:65536", "https://[::1")),
        *(("--trusted-proxies", text) for text in ("proxy.example", "*", "10.0.0.1/8")),
        *(("--trusted-proxies", text) for text in ("10.0.0.0/33", "10.0.0.1:80")),
        *(("--kind-limits", text) for text in ("2", "[]", '{"a": 1025}', '{"a": null}', "{")),
        ("--log-level", "loud\nand\x1b[1mclear"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(flag: str, text: str) -> None:
    """The line names the flag or the variable, and what is allowed."""
    option = next(option for option in OPTIONS.values() if option.flag == flag)
    assert refusal([f"{flag}={text}"]).startswith(f"{flag}: ")
    assert option.rule.allowed in refusal([f"{flag}={text}"])
    assert refusal(environ={option.variable: text}).startswith(f"{option.variable}: ")


@pytest.mark.parametrize(
    "line",
    [
        'port = "80"',
        "port = true",
        "port = 80.0",
        "warm_s = false",
        "data = 1",
        "durability = 1",
        "hosts = [1]",
        "cors_origins = [1]",
        "kinds = [1]",
        "trusted_proxies = [1]",
        "default_params = '{}'",
        "default_params = {at = 2030-01-01}",
        "default_params = {at = nan}",
        "kind_limits = 2",
        "kind_limits = {fetch = 0}",
        "kind_limits = {fetch = 1.5}",
        "kind_limits = {fetch = true}",
        "kind_limits = {fetch = '2'}",
        "run_timeouts_s = {exec = 0}",
        "stall_timeouts_s = {exec = nan}",
        "slots = {n = 1}",
    ],
)
def test_a_wrong_type_in_the_file_is_refused(line: str, tmp_path: Path) -> None:
    """The line names the key and the file."""
    file = toml(tmp_path, line)
    assert refusal(["--config", file]).startswith(f"{line.split(maxsplit=1)[0]} in '{file}': ")


def test_a_bad_value_is_refused_even_where_a_stronger_source_replaces_it() -> None:
    """A mistake in the environment does not hide behind a flag."""
    assert refusal(["--port", "1"], {"SLUICE_PORT": "x"}).startswith("SLUICE_PORT: 'x'")


def test_unknown_names_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    """A typo in a flag, a variable or a key does not pass unnoticed."""
    file = toml(tmp_path, "prot = 1")
    assert "did you mean --port?" in refusal(["--prot=1"])
    assert "did you mean SLUICE_PORT?" in refusal(environ={"SLUICE_PROT": "1"})
    assert "did you mean port?" in refusal(["--config", file])
    assert "'extra'" in refusal(["extra"])
    assert "--help" in refusal(["--zzzzz"])


def test_flags_are_not_abbreviated_and_need_a_value() -> None:
    """`--por 1` and `--port` without a value are mistakes."""
    assert "did you mean --port?" in refusal(["--por", "1"])
    assert "--port" in refusal(["--port"])


def test_the_switch_of_the_tests_is_not_taken_for_a_typo() -> None:
    """SLUICE_CI is meant for the tests, and servers inherit it."""
    assert load([], {"SLUICE_CI": "1"}) == Config()


def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """A file that is missing, a folder, not TOML or not UTF-8 is named with the reason."""
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b"port = \xff")
    missing = str(tmp_path / "none\n.toml")
    assert "No such file" in refusal(["--config", missing])
    assert refusal(environ={"SLUICE_CONFIG": missing}).startswith("SLUICE_CONFIG: ")
    assert "directory" in refusal(["--config", str(tmp_path)])
    assert "not a TOML file" in refusal(["--config", str(bad)])
    assert "not a TOML file" in refusal(["--config", toml(tmp_path, "port = ")])
    assert "cannot read ''" in refusal(["--config", ""])


def test_force_cannot_come_before_the_warning() -> None:
    """grace_s below warn_s is refused, and the line says where both come from."""
    message = refusal(["--grace-s", "5"])
    assert "grace_s = 5s (--grace-s)" in message
    assert "warn_s = 10s (default)" in message
    assert load(["--grace-s", "5", "--warn-s", "5"], {}).grace_s == 5


@EACH_OPTION
def test_help_shows_each_setting(option: Option) -> None:
    """Help has the flag, the meaning, the default and the unit of each setting."""
    shown = help_text()
    assert f"{option.flag} {option.rule.metavar}" in shown
    assert option.meaning in shown
    assert f"(default {option.shown_default or 'none'}" in shown
    if option.rule.metavar == "N" and option.rule.unit:
        assert f"default {option.shown_default} {option.rule.unit};" in shown


def test_help_tells_of_the_file_the_environment_and_add() -> None:
    """Help also has what is no setting: --config, the variables, and `add`."""
    shown = help_text()
    for text in ("--config FILE", "SLUICE_CONFIG", "SLUICE_MAX_QUEUED", "add FILE..."):
        assert text in shown


@EACH_OPTION
def test_names_end_with_their_unit(option: Option) -> None:
    """A size ends with _bytes, a rate with _per_s, a duration with _s, and nothing else does."""
    assert option.name.endswith("_bytes") == (option.rule.unit == "bytes")
    assert option.name.endswith("_bytes_per_s") == (option.rule.unit == "bytes/s")
    assert option.name.endswith("_s") == (option.rule.unit in ("seconds", "bytes/s"))


def test_the_documentation_is_up_to_date() -> None:
    """docs/configuration.md is what `python config.py` prints."""
    printed = subprocess.run(
        [sys.executable, ROOT / "config.py"], capture_output=True, check=True, encoding="utf-8"
    )
    file = ROOT / "docs" / "configuration.md"
    assert file.read_text(encoding="utf-8") == printed.stdout == config.document()
    assert "python config.py" in printed.stdout.splitlines()[0]
