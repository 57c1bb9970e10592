"""Every setting of the service, in one frozen dataclass.

A field carries all that is known about it: its default, the rule that reads and bounds it, and its
meaning. `--help`, the checks and docs/configuration.md are generated from that, so they cannot
disagree. A rule accepts text (flags, environment) and the TOML types it names. Sources are read
from the weakest to the strongest, and each value is checked even where a stronger source replaces
it: a mistake in a file should not hide behind a flag. Whatever is wrong becomes one ConfigError of
one line that says where, what, and what is allowed.
"""

import argparse
import dataclasses
import difflib
import ipaddress
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86400.0

_SIZE_UNITS = {
    **{"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB},
}
_TIME_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": MINUTE_S, "h": HOUR_S, "d": DAY_S}
_HOST_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_ORIGIN = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[^\[\]:\s]+)(?::([0-9]{1,5}))?")
_USUAL_PORTS = {"http": 80, "https": 443}
_LIST = "separated by commas, or in a file as a list"

# The tests and CI talk to each other by these; a server that they start inherits them.
_NOT_OURS = frozenset({"SLUICE_CI"})

N = TypeVar("N", int, float)
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ConfigError(Exception):
    """A setting is wrong; the message is one line for the person who starts the service."""


class Rule(NamedTuple):
    """How one setting is read: `read` raises ValueError for what `allowed` does not describe."""

    read: Callable[[Any], object]
    allowed: str
    show: Callable[[Any], str]
    how_written: str = ""
    file_types: tuple[type, ...] = (str,)
    unit: str = ""
    metavar: str = "TEXT"


def _whole(low: int, high: int, unit: str = "") -> Rule:
    def read(raw: str | int) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", str(raw)):
            raise ValueError
        return _within(int(raw), low, high)

    return Rule(read, f"a whole number from {low} to {high}", str, "", (int,), unit, "N")


def _size(low_bytes: int, high_bytes: int, unit: str = "bytes") -> Rule:
    def read(raw: str | int) -> int:
        match = re.fullmatch(r"([0-9]{1,18}) ?([kKMGT]i?B)?", str(raw))
        if not match or (times := match[2] or "") not in _SIZE_UNITS:
            raise ValueError
        return _within(int(match[1]) * _SIZE_UNITS[times], low_bytes, high_bytes)

    allowed = f"a size from {_show_size(low_bytes)} to {_show_size(high_bytes)}"
    how_written = "bytes, or with KiB, MiB, GiB, TiB, kB, MB, GB or TB"
    return Rule(read, allowed, _show_size, how_written, (int, str), unit, "SIZE")


def _duration(low_s: float = 0.001, high_s: float = 3650 * DAY_S) -> Rule:
    def read(raw: str | float) -> float:
        match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?(ms|s|m|h|d)?", str(raw))
        if not match:
            raise ValueError
        return _within(float(match[1]) * _TIME_UNITS[match[2] or ""], low_s, high_s)

    allowed = f"a time from {_show_duration(low_s)} to {_show_duration(high_s)}"
    how_written = "seconds, or with ms, s, m, h or d"
    return Rule(read, allowed, _show_duration, how_written, (int, float, str), "seconds", "TIME")


def _word(*choices: str) -> Rule:
    def read(raw: str) -> str:
        if raw not in choices:
            raise ValueError
        return raw

    return Rule(read, f"{', '.join(choices[:-1])} or {choices[-1]}", str, metavar="WORD")


def _address() -> Rule:
    def read(raw: str) -> str:
        return raw if raw == "localhost" else str(ipaddress.ip_address(raw))

    return Rule(read, "an IP address or localhost", str, metavar="ADDRESS")


def _path() -> Rule:
    def read(raw: str) -> Path:
        if not raw or "\0" in raw:
            raise ValueError
        return Path(raw)

    def show(path: Path) -> str:
        return str(path) if path.is_absolute() else f"./{path}"

    return Rule(read, "the path of a folder", show, metavar="FOLDER")


def _program_file() -> Rule:
    def read(raw: str) -> Path | None:
        if raw and not Path(raw).is_file():
            raise ValueError
        return Path(raw) if raw else None

    def show(path: Path | None) -> str:
        return "" if path is None else str(path)

    return Rule(read, "the path of a file", show, metavar="FILE")


def _kind_paths() -> Rule:
    def read(raw: str | list[object]) -> tuple[Path, ...]:
        paths = tuple(dict.fromkeys(Path(item) for item in _items(raw)))
        if not all(path.is_dir() or (path.suffix == ".py" and path.is_file()) for path in paths):
            raise ValueError
        return paths

    def show(paths: tuple[Path, ...]) -> str:
        return ",".join(map(str, paths))

    allowed = "files that end in .py, or folders; each must exist"
    return Rule(read, allowed, show, _LIST, (str, list), metavar="PATH")


def _kind_name() -> Rule:
    def read(raw: str) -> str:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", raw):
            raise ValueError
        return raw

    return Rule(read, "the name of a kind of process (lower case)", str, metavar="KIND")


def _host_names() -> Rule:
    def read(raw: str | list[object]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_host_name(name) for name in _items(raw)))

    allowed = "host names or IP addresses without a port"
    return Rule(read, allowed, ",".join, _LIST, (str, list), metavar="HOST")


def _items(raw: str | list[object]) -> Iterator[str]:
    for item in raw.split(",") if isinstance(raw, str) else raw:
        if not isinstance(item, str):
            raise ValueError
        if item:
            yield item


def _host_name(raw: str) -> str:
    name = raw.strip().lower()
    if ":" in name:
        return str(ipaddress.IPv6Address(name.removeprefix("[").removesuffix("]")))
    if not _HOST_NAME.fullmatch(name):
        raise ValueError
    return name


def _origins() -> Rule:
    def read(raw: str | list[object]) -> tuple[str, ...]:
        origins = tuple(dict.fromkeys(_origin(item) for item in _items(raw)))
        if "*" in origins and len(origins) > 1:
            raise ValueError
        return origins

    allowed = "origins such as https://app.example:8443 (without a path), or * alone"
    return Rule(read, allowed, ",".join, _LIST, (str, list), metavar="ORIGIN")


def _origin(raw: str) -> str:
    """Return the origin as browsers write it: lower case, and without a scheme's usual port."""
    origin = raw.strip().lower()
    if origin == "*":
        return origin
    match = _ORIGIN.fullmatch(origin)
    if match is None:
        raise ValueError
    scheme, host = match[1], _host_name(match[2])
    host = f"[{host}]" if ":" in host else host
    port = _within(int(match[3] or _USUAL_PORTS[scheme]), 1, 65535)
    return f"{scheme}://{host}" + ("" if port == _USUAL_PORTS[scheme] else f":{port}")


def _networks() -> Rule:
    def read(raw: str | list[object]) -> tuple[Network, ...]:
        return tuple(dict.fromkeys(ipaddress.ip_network(item.strip()) for item in _items(raw)))

    def show(networks: tuple[Network, ...]) -> str:
        return ",".join(str(network) for network in networks)

    allowed = "IP addresses or networks such as 10.0.0.0/8"
    return Rule(read, allowed, show, _LIST, (str, list), metavar="NETWORK")


def _places() -> Rule:
    def read(raw: str | list[object]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_place(item.strip()) for item in _items(raw)))

    allowed = "host names, IP addresses or networks such as 10.0.0.0/8"
    return Rule(read, allowed, ",".join, _LIST, (str, list), metavar="PLACE")


def _place(raw: str) -> str:
    try:
        return str(ipaddress.ip_network(raw))
    except ValueError:
        return _host_name(raw)


def _json_object() -> Rule:
    def read(raw: str | dict[str, object]) -> dict[str, object]:
        value = json.loads(raw) if isinstance(raw, str) else raw
        if not isinstance(value, dict):
            raise ValueError
        json.dumps(value, allow_nan=False)  # TOML also knows dates, and both know NaN
        return value

    how_written = "in a file: a table of JSON values"
    return Rule(read, "a JSON object", json.dumps, how_written, (dict,), metavar="JSON")


def _numbers(rule: Rule, what: str) -> Rule:
    """A number for each of some names, each read by ``rule``."""

    def read(raw: str | dict[str, object]) -> dict[str, object]:
        value = json.loads(raw) if isinstance(raw, str) else raw
        if not isinstance(value, dict) or any(isinstance(n, bool | str) for n in value.values()):
            raise ValueError
        return {name: rule.read(n) for name, n in value.items()}

    def show(numbers: dict[str, object]) -> str:
        return json.dumps(numbers)

    allowed = f"a JSON object of {what}"
    return Rule(read, allowed, show, "in a file: a table", (dict,), rule.unit, metavar="JSON")


def _within(value: N, low: N, high: N) -> N:
    if not low <= value <= high:
        raise ValueError
    return value


def _show_size(size_bytes: int) -> str:
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _SIZE_UNITS[unit] == 0:
            return f"{size_bytes // _SIZE_UNITS[unit]}{unit}"
    return str(size_bytes)


def _show_duration(time_s: float) -> str:
    for unit in ("d", "h", "m", "s"):
        if time_s and time_s % _TIME_UNITS[unit] == 0:
            return f"{time_s / _TIME_UNITS[unit]:.0f}{unit}"
    return f"{time_s * 1000:g}ms" if time_s else "0s"


def _about(rule: Rule, meaning: str) -> Mapping[str, object]:
    return {"rule": rule, "meaning": meaning}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one running service; `load` makes a checked one."""

    address: str = field(
        default="127.0.0.1",
        metadata=_about(_address(), "where to listen; never looked up by name"),
    )
    port: int = field(
        default=8888,
        metadata=_about(_whole(0, 65535), "TCP port to listen on; 0 takes any free one"),
    )
    data: Path = field(
        default=Path("data"),
        metadata=_about(
            _path(),
            "folder of the stored files, unfinished uploads and databases; made if missing, and "
            "relative to the working directory",
        ),
    )
    durability: Literal["always", "interval", "never"] = field(
        default="interval",
        metadata=_about(
            _word("always", "interval", "never"),
            "when acknowledged bytes are forced to disk, so that they survive a power loss: before "
            "each acknowledgement, once a second (and always on completion), or never; all of them "
            "survive a crash of the service",
        ),
    )
    slots: int = field(
        default=8,
        metadata=_about(
            _whole(1, 1024, "processes"), "processes that run at once; more of them wait"
        ),
    )
    owner_slots: int = field(
        default=0,
        metadata=_about(
            _whole(0, 1024, "processes"), "processes of one owner that run at once; 0 is no limit"
        ),
    )
    kind_limits: Mapping[str, int] = field(
        default_factory=dict,
        metadata=_about(
            _numbers(_whole(1, 1024, "processes"), "whole numbers from 1 to 1024"),
            'processes of a kind that run at once, as {"fetch": 2}, before what the kind says '
            "itself",
        ),
    )
    run_timeouts_s: Mapping[str, float] = field(
        default_factory=dict,
        metadata=_about(
            _numbers(_duration(), "seconds, more than 0"),
            'how long a process of a kind may run, pauses and queueing aside, as {"exec": 3600}, '
            "before what the kind says itself",
        ),
    )
    stall_timeouts_s: Mapping[str, float] = field(
        default_factory=dict,
        metadata=_about(
            _numbers(_duration(), "seconds, more than 0"),
            "the same for how long it may go without a sign of progress",
        ),
    )
    max_upload_bytes: int = field(
        default=TIB,
        metadata=_about(_size(1, 1024 * TIB), "largest upload; a larger one is refused with 413"),
    )
    quota_bytes: int = field(
        default=0,
        metadata=_about(
            _size(0, 1024 * TIB),
            "what one owner may have stored and under way together; 0 is no limit",
        ),
    )
    max_uploads: int = field(
        default=10_000,
        metadata=_about(
            _whole(1, 1_000_000, "uploads"),
            "unfinished uploads of one owner; one more is refused with 429",
        ),
    )
    digest: Literal["asked", "always"] = field(
        default="asked",
        metadata=_about(
            _word("asked", "always"),
            "whether SHA-256 and CRC-32 are computed of each upload, or only where the sender asks "
            "for it; a process of its own does it",
        ),
    )
    delete_completed: Literal["allow", "refuse"] = field(
        default="allow",
        metadata=_about(
            _word("allow", "refuse"),
            "whether DELETE of a completed upload (tus, resumable) removes the stored file",
        ),
    )
    informational: Literal["off", "on"] = field(
        default="off",
        metadata=_about(
            _word("off", "on"),
            "whether 104 (Upload Resumption Supported) is sent to clients that can take it; only "
            "where no proxy stands in between (see docs/resumable.md)",
        ),
    )
    max_json_bytes: int = field(
        default=MIB,
        metadata=_about(
            _size(KIB, 64 * MIB), "largest JSON body; a larger one is refused with 413"
        ),
    )
    upload_expires_s: float = field(
        default=7 * DAY_S,
        metadata=_about(
            _duration(), "an unfinished upload is dropped this long after its last byte"
        ),
    )
    pause_hold_s: float = field(
        default=HOUR_S,
        metadata=_about(_duration(0), "how long a paused transfer keeps its connection open"),
    )
    warm_s: float = field(
        default=30.0,
        metadata=_about(
            _duration(0),
            "how long a paused process stays in memory before it is unwound to its cursor",
        ),
    )
    warn_s: float = field(
        default=10.0,
        metadata=_about(
            _duration(0), "a process that has not paused or stopped by then is reported as late"
        ),
    )
    grace_s: float = field(
        default=30.0,
        metadata=_about(
            _duration(0),
            "a process that has not paused or stopped by then is forced to; at least warn_s",
        ),
    )
    child_grace_s: float = field(
        default=5.0,
        metadata=_about(
            _duration(0), "a program that is told to end (SIGTERM) is killed after this time"
        ),
    )
    max_stopped: int = field(
        default=64,
        metadata=_about(
            _whole(1, 100_000, "jobs"),
            "paused jobs whose programs are kept stopped, with their memory; of more, the longest "
            "paused are ended and start anew when they are resumed",
        ),
    )
    stop_grace_s: float = field(
        default=25.0,
        metadata=_about(
            _duration(0), "how long a stop (SIGTERM) waits for open requests and processes"
        ),
    )
    body_idle_s: float = field(
        default=5 * MINUTE_S,
        metadata=_about(
            _duration(), "a sender that sends nothing for so long, while not paused, is cut off"
        ),
    )
    body_min_bytes_per_s: int = field(
        default=100,
        metadata=_about(
            _size(0, GIB, "bytes/s"),
            "a sender that is slower than this on average over body_idle_s, while not paused, is "
            "cut off",
        ),
    )
    write_idle_s: float = field(
        default=5 * MINUTE_S,
        metadata=_about(
            _duration(), "a reader that reads nothing for so long, while not paused, is cut off"
        ),
    )
    terminate_recent_s: float = field(
        default=MINUTE_S,
        metadata=_about(
            _duration(0),
            "an upload by blocks whose last block is older than this is not found by "
            "DELETE /upload/terminate without a selector",
        ),
    )
    chunk_bytes: int = field(
        default=MIB,
        metadata=_about(
            _size(1, 4 * MIB), "what one GET /download returns unless it asks otherwise"
        ),
    )
    keep_jobs_s: float = field(
        default=30 * DAY_S,
        metadata=_about(_duration(), "finished jobs are deleted after this time; their files stay"),
    )
    keep_events: int = field(
        default=1_000_000,
        metadata=_about(
            _whole(100, 1_000_000_000, "events"),
            "transitions that a subscriber of the channel may lag behind and still miss none; "
            "those of jobs that exist are kept anyway",
        ),
    )
    max_queued: int = field(
        default=10_000,
        metadata=_about(
            _whole(1, 10_000_000, "jobs"), "jobs that may wait; one more is refused with 429"
        ),
    )
    owner_queued: int = field(
        default=0,
        metadata=_about(
            _whole(0, 10_000_000, "jobs"),
            "jobs of one owner that may wait, within max_queued; 0 is no limit of their own",
        ),
    )
    max_sockets: int = field(
        default=1000,
        metadata=_about(_whole(1, 1_000_000, "connections"), "channel connections of one owner"),
    )
    kinds: tuple[Path, ...] = field(
        default=(),
        metadata=_about(
            _kind_paths(),
            "further kinds of processes, one in each Python file (see docs/kinds.md); whoever can "
            "write there can run code in this service; the flag may be repeated",
        ),
    )
    programs: Path | None = field(
        default=None,
        metadata=_about(
            _program_file(),
            "TOML file of the programs that may be run as jobs (see docs/programs.md)",
        ),
    )
    default_kind: str = field(
        default="count",
        metadata=_about(_kind_name(), "kind that GET /{id}/process/ starts when it names none"),
    )
    default_params: Mapping[str, object] = field(
        default_factory=lambda: {"steps": 100, "delay_s": 0.1},
        metadata=_about(_json_object(), "parameters of default_kind"),
    )
    fetch_allow: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            _places(),
            "where the process fetch may go though it is not on the public Internet; the flag may "
            "be repeated",
        ),
    )
    hosts: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            _host_names(),
            "further Host names that this service answers to, besides its own address and "
            "localhost; the flag may be repeated",
        ),
    )
    cors_origins: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            _origins(),
            "origins whose pages may use this service as its own page does, or * for every page "
            "there is (see docs/proxies.md); the flag may be repeated",
        ),
    )
    trusted_proxies: tuple[Network, ...] = field(
        default=(),
        metadata=_about(
            _networks(),
            "addresses of the proxies whose Forwarded and X-Forwarded- headers are believed (see "
            "docs/proxies.md); the flag may be repeated",
        ),
    )
    log_level: Literal["debug", "info", "warning", "error"] = field(
        default="info",
        metadata=_about(_word("debug", "info", "warning", "error"), "least level that is logged"),
    )


class Option(NamedTuple):
    """One field of Config as a person meets it: flag, variable, key, default and rule."""

    name: str
    default: object
    rule: Rule
    meaning: str

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return "SLUICE_" + self.name.upper()

    @property
    def shown_default(self) -> str:
        """The default as one may write it; empty if it is empty."""
        return self.rule.show(self.default)


def _options() -> Iterator[Option]:
    defaults = Config()
    for item in dataclasses.fields(Config):
        default = getattr(defaults, item.name)
        yield Option(item.name, default, item.metadata["rule"], item.metadata["meaning"])


OPTIONS = {option.name: option for option in _options()}


class _Given(NamedTuple):
    """One value, where it was written, and whether it is text or already has a TOML type."""

    option: Option
    raw: object
    source: str
    typed: bool = False


def load(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Return the checked settings: command line over environment over TOML file over defaults.

    `--help` prints to stdout and exits 0. Anything wrong raises ConfigError.
    """
    flags = _read_flags(argv)
    variables = list(_read_environment(environ))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for given in (*_read_file(flags, environ), *variables, *_given_flags(flags)):
        values[given.option.name] = _checked(given)
        sources[given.option.name] = given.source
    config = Config(**values)
    if config.warn_s > config.grace_s:
        warn, grace = (
            f"{name} = {_show_duration(getattr(config, name))} ({sources.get(name, 'default')})"
            for name in ("warn_s", "grace_s")
        )
        raise ConfigError(f"{grace} is not allowed, expected at least {warn}")
    return config


def _checked(given: _Given) -> object:
    rule = given.option.rule
    if given.typed and type(given.raw) not in rule.file_types:
        raise _refused(given)
    try:
        return rule.read(given.raw)
    except (ValueError, TypeError, RecursionError):
        raise _refused(given) from None


def _refused(given: _Given) -> ConfigError:
    rule = given.option.rule
    shown = ascii(given.raw)  # also keeps a line break in the value out of the message
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    expected = f"{rule.allowed} ({rule.how_written})" if rule.how_written else rule.allowed
    return ConfigError(f"{given.source}: {shown} is not allowed, expected {expected}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}")


def _parser() -> _Parser:
    parser = _Parser(
        prog="python server.py",
        usage="python server.py [--OPTION VALUE]...\n       python server.py add FILE...\n"
        "       python server.py check KIND [PARAMS-JSON] [FILE...]",
        description="Sluice: big uploads, big downloads and long processes\n"
        "that can be paused, resumed, cancelled and watched while they run.",
        epilog="add FILE... publishes files that are already on this machine, then exits.\n"
        "check KIND pauses, kills and cancels a kind of process at every point; check --help.\n\n"
        "Each option can also be set by the environment (--max-queued: SLUICE_MAX_QUEUED)\n"
        "or in the TOML file (max_queued = 500); the command line wins, then the environment.\n"
        "Sizes take KiB, MiB, GiB, TiB, kB, MB, GB, TB; times take ms, s, m, h, d.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings (SLUICE_CONFIG)")
    for option in OPTIONS.values():
        unit = f" {option.rule.unit}" if option.rule.metavar == "N" else ""
        default = f"default {option.shown_default or 'none'}{unit}".rstrip()
        parser.add_argument(
            option.flag,
            dest=option.name,
            metavar=option.rule.metavar,
            action="append" if list in option.rule.file_types else "store",
            help=f"{option.meaning} ({default}; {option.rule.allowed})".replace("%", "%%"),
        )
    return parser


def _read_flags(argv: Sequence[str]) -> Mapping[str, Any]:
    known, unknown = _parser().parse_known_args(argv)
    for word in unknown:
        flag = word.partition("=")[0]
        flags = ["--config", *(option.flag for option in OPTIONS.values())]
        raise ConfigError(f"command line: unknown option {flag!a}{_hint(flag, flags)}")
    return vars(known)


def _given_flags(flags: Mapping[str, Any]) -> Iterator[_Given]:
    for option in OPTIONS.values():
        raw = flags[option.name]
        if raw is not None:
            yield _Given(option, ",".join(raw) if isinstance(raw, list) else raw, option.flag)


def _read_environment(environ: Mapping[str, str]) -> Iterator[_Given]:
    by_variable = {option.variable: option for option in OPTIONS.values()}
    for variable in sorted(environ):
        if option := by_variable.get(variable):
            yield _Given(option, environ[variable], variable)
        elif variable.startswith("SLUICE_") and variable not in {"SLUICE_CONFIG", *_NOT_OURS}:
            hint = _hint(variable, [*by_variable, "SLUICE_CONFIG"])
            raise ConfigError(f"environment: unknown variable {variable!a}{hint}")


def _read_file(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[_Given]:
    source = "--config" if flags["config"] is not None else "SLUICE_CONFIG"
    name = flags["config"] if flags["config"] is not None else environ.get("SLUICE_CONFIG")
    if name is None:
        return
    try:
        table = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{source}: cannot read {name!a}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: {name!a} is not a TOML file: {error}") from None
    for key, raw in table.items():
        if key not in OPTIONS:
            raise ConfigError(f"{name!a}: unknown key {key!a}{_hint(key, list(OPTIONS))}")
        yield _Given(OPTIONS[key], raw, f"{key} in {name!a}", typed=True)


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]}?" if close else "; --help lists what is allowed"


def describe() -> str:
    """Return a Markdown table of every setting."""
    rows = [
        "| Flag | Environment | Default | Unit | Meaning |",
        "|---|---|---|---|---|",
    ]
    for option in OPTIONS.values():
        meaning = (
            f"{option.meaning[0].upper()}{option.meaning[1:]}. Allowed: {option.rule.allowed}."
        )
        cells = (
            f"`{option.flag}`",
            f"`{option.variable}`",
            f"`{option.shown_default}`" if option.shown_default else "none",
            option.rule.unit or "-",
            meaning,
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def document() -> str:
    """Return docs/configuration.md."""
    return f"""\
<!-- Made by `python config.py > docs/configuration.md` (or `make docs`); do not edit. -->

# Configuration

Each setting has a flag, an environment variable and a key in a TOML file. The command line wins
over the environment, the environment over the file, the file over the default. The file is named
by `--config FILE` or `SLUICE_CONFIG`; its keys are the flags with `_` for `-` and without the
leading dashes (`max_queued = 500`). An unknown flag, an unknown `SLUICE_` variable, an unknown key
and a value that is not allowed stop the start with one line on stderr and exit code 2.

Sizes are bytes, or take a suffix: `64MiB` (KiB, MiB, GiB, TiB, and kB, MB, GB, TB by thousands).
Times are seconds, or take a suffix: `500ms`, `30s`, `5m`, `1h`, `7d`.

{describe()}
"""


if __name__ == "__main__":
    sys.stdout.write(document())
