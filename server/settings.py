"""Every setting of the server with its default and meaning: flags, ``SLR_`` variables, and keys of a YAML file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from slr_core.suggest import did_you_mean
from slr_core.yaml_text import parse_yaml

_MIN_KEY_LENGTH = 16
_MAX_CONFIG_BYTES = 1 << 20
HASH_PREFIX = "sha256:"
"""Marks a key that is given as its hash."""
_HASH = re.compile(rf"{HASH_PREFIX}[0-9a-fA-F]{{64}}")


def check_keys(value: SecretStr) -> SecretStr:
    """The keys, separated by commas.

    Raises:
        PydanticCustomError: there is none, or one is too short, has control characters or is no hash.
    """
    keys = split_list(value.get_secret_value())
    if not keys or any(len(key) < _MIN_KEY_LENGTH for key in keys):
        raise PydanticCustomError("short_key", f"every key must have at least {_MIN_KEY_LENGTH} characters")
    if not all(key.isprintable() for key in keys):
        raise PydanticCustomError("key_characters", "a key may not have control characters")
    if any(key.startswith(HASH_PREFIX) and not _HASH.fullmatch(key) for key in keys):
        raise PydanticCustomError("key_hash", f"{HASH_PREFIX} must be followed by the 64 hexadecimal digits of a hash")
    return value


_Timeout = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
"""Seconds, up to a day."""
Keys = Annotated[SecretStr, AfterValidator(check_keys)]


class ServerSettings(BaseSettings):
    """Serve a latent reasoner over HTTP.

    Each flag can also be set as the environment variable SLR_<NAME>, or as a key of the --config file: flags take
    precedence over the environment, and the environment over the file.
    """

    model_config = SettingsConfigDict(
        env_prefix="SLR_",
        frozen=True,
        extra="forbid",
        cli_prog_name="slr-serve",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        hide_input_in_errors=True,
    )

    model: str | None = Field(
        None,
        min_length=1,
        description="Checkpoint folder, hub id, or name of a bundled checkpoint, such as prontoqa. Default: prosqa.",
    )
    served_model_name: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="Name of the model in requests, responses and metrics. Default: the last part of --model.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N. auto: a GPU if there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Data type of the weights. auto: the checkpoint's own if the device computes it natively, "
        "else float32.",
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none",
        description="Rounding of the weights of linear layers, on a CPU; not of embeddings, LM head and adapters.",
    )
    loop_sets: str | None = Field(
        None, description="Folder of checkpoints that the admin endpoints can load as further loop adapter sets."
    )
    offline: bool = Field(
        True,
        description="Download nothing once the model is loaded: a loop adapter set's base must be on disk or in the "
        "hub's cache.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 for any free one.")

    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Number of CPU threads of the engine. Default: the fastest count, measured at startup "
        "and again when the step time has changed.",
    )
    static_shapes: bool | None = Field(
        None,
        description="Pad loop and decode passes to few fixed shapes, replayed as CUDA graphs on a GPU. "
        "Default: on with a GPU.",
    )
    slots: int = Field(32, ge=1, le=4096, description="Maximum number of answers in progress.")
    cache_gib: float = Field(4.0, gt=0, le=4096, description="Memory of the key/value cache, in GiB.")
    prefix_gib: float = Field(
        0.25, ge=0, le=4096, description="Memory of the prefix cache (prompts that may repeat), in GiB; 0 for none."
    )

    max_queue: int = Field(
        256, ge=1, le=1_000_000, description="Maximum number of waiting answers; requests beyond it get 429."
    )
    max_connections: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Maximum number of open connections. Default: what the limit of open files (ulimit -n) allows.",
    )
    max_requests: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Maximum number of generation requests in progress; requests beyond it get 429. "
        "Default: twice --slots and --max-queue together.",
    )
    elastic_floor: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of its iteration budget that a new request gets when half a queue comes before it; "
        "1 for all.",
    )
    max_body_bytes: int = Field(1 << 20, ge=1, description="Maximum size of a request body, in bytes.")
    max_prompts: int = Field(64, ge=1, description="Maximum number of prompts in a request.")
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Maximum number of tokens of a prompt. Default: what fits the model."
    )
    max_prompt_chars: int | None = Field(
        None,
        ge=1,
        description="Maximum number of characters of a prompt, checked before it is tokenized. "
        "Default: 16 for each position of a slot, and at least 16384.",
    )
    max_n: int = Field(16, ge=1, description="Maximum n of a request.")
    max_answers: int = Field(64, ge=1, description="Maximum number of answers of a request: prompts times n.")
    max_iterations: int = Field(64, ge=0, description="Maximum max_iterations of a request.")
    max_new_tokens: int = Field(1024, ge=1, description="Maximum number of tokens of an answer.")
    max_top_tokens: int = Field(50, ge=0, description="Maximum top_tokens of a trace, and maximum logprobs.")
    max_state_values: int = Field(
        1 << 20, ge=0, description="Maximum number of values in all states that a trace returns; 0 for no states."
    )

    max_response_values: int = Field(
        1 << 17, ge=1, description="Maximum number of top tokens or log-probabilities in a response."
    )

    request_timeout_s: _Timeout = Field(120.0, description="Time limit of a request in seconds; then it gets 504.")
    load_timeout_s: _Timeout = Field(
        300.0,
        description="Seconds in which the admin endpoint loads a loop adapter set; then it answers 504.",
    )
    stall_timeout_s: _Timeout = Field(
        60.0,
        description="Seconds without an engine step, while work is pending, after which /livez fails.",
    )
    head_timeout_s: float = Field(
        10.0,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        description="Seconds for a new connection to send its first byte, and for a request's headers to arrive.",
    )
    body_timeout_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        description="Seconds for a request's body to arrive; then it gets 408.",
    )
    write_timeout_s: float = Field(
        30.0, gt=0, le=3600, allow_inf_nan=False, description="Seconds a client may take to read sent data."
    )
    grace_s: float = Field(
        30.0, ge=0, le=3600, allow_inf_nan=False, description="Seconds for running requests to finish after SIGTERM."
    )

    api_keys: Keys | None = Field(
        None, description="Comma-separated API keys, or sha256:<hex> of them. Default: no key is required."
    )
    api_keys_file: str | None = Field(
        None,
        description="File of API keys, or sha256:<hex> of them, one a line; read again on SIGHUP. Default: no file.",
    )
    admin_key: Keys | None = Field(
        None, description="Key of the admin endpoints, or sha256:<hex> of it. Default: they are disabled."
    )
    allowed_hosts: str | None = Field(
        None,
        description="Comma-separated names that the Host header may have; * for all. Default: all, but with a loopback "
        "--host only IP addresses, localhost and names without a dot.",
    )
    cors_origins: str | None = Field(
        None, description="Comma-separated origins whose web pages may call the server; * for all."
    )

    ssl_certfile: str | None = Field(
        None, description="PEM file of the certificate, and those of its issuers, for HTTPS. Default: plain HTTP."
    )
    ssl_keyfile: str | None = Field(
        None, description="PEM file of the certificate's private key. Default: it is in --ssl-certfile."
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Minimum log level.")
    log_format: Literal["text", "json"] = Field("text", description="Log format.")
    otel_endpoint: str | None = Field(
        None,
        description="Collector for request spans (OTLP over HTTP, http://host:4318/v1/traces); needs the extra otel.",
    )

    config: str | None = Field(None, description="YAML file of these settings, with underscores: max_queue: 64.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources of settings, in order of precedence."""
        return init_settings, env_settings, _ConfigFile(settings_cls)

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise PydanticCustomError("tls", "ssl_keyfile needs ssl_certfile")
        return self

    @property
    def model_name(self) -> str:
        """Name of the served model in requests, responses and metrics."""
        if self.served_model_name is not None:
            return self.served_model_name
        # Imported here because it imports torch, which --help does not need.
        from slr_core.checkpoint.folder import DEFAULT_CHECKPOINT

        return os.path.basename(os.path.abspath(self.model or DEFAULT_CHECKPOINT))


class _ConfigFile(PydanticBaseSettingsSource):
    """The YAML file that the setting ``config`` names."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("all values are read at once")

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        return {} if path is None else _read_config(Path(path))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:  # perhaps a device without end
            content = file.read(_MAX_CONFIG_BYTES + 1)
        if len(content) > _MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {_MAX_CONFIG_BYTES} bytes")
        values = parse_yaml(content.decode())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"config: cannot read {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"config: {path} must hold settings as `name: value`")
    known = ServerSettings.model_fields.keys() - {"config"}
    for name in values:
        if name not in known:
            raise SettingsError(f"config: {path}: unknown setting {name}{did_you_mean(str(name), known)}")
    return values


def plain_message(message: str) -> str:
    """A validation message of pydantic, to follow the name of a field."""
    message = re.sub(r"^(?:Input|String|List|Dictionary) should ", "must ", message)
    return re.sub(r" after validation, not (?:more than )?\d+$", "", message)


def split_list(text: str) -> list[str]:
    """The parts of a comma-separated setting."""
    return [part.strip() for part in text.split(",") if part.strip()]


def settings_table() -> str:
    """The settings as a Markdown table, for docs/server.md."""
    rows = ["| flag | environment | default | meaning |", "|---|---|---|---|"]
    for name, field in ServerSettings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        flag = f"`--{name.replace('_', '-')}`"
        rows.append(f"| {flag} | `SLR_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(settings_table())
