"""Every setting of the server, its default and its meaning: flags of ``slr-serve`` and ``SLR_…`` alike."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

_SHORTEST_KEY = 16


def _long_keys(value: SecretStr) -> SecretStr:
    keys = split(value.get_secret_value())
    if not keys or any(len(key) < _SHORTEST_KEY for key in keys):
        raise PydanticCustomError("short_key", f"every key must have at least {_SHORTEST_KEY} characters")
    return value


Keys = Annotated[SecretStr, AfterValidator(_long_keys)]


class Settings(BaseSettings):
    """Serve a latent reasoner over HTTP. Each flag can also be set as SLR_<NAME> in the environment."""

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
        description="checkpoint folder or hub id, or the name of one that ships (prosqa, prontoqa); none: prosqa",
    )
    loop_sets: str | None = Field(
        None, description="folder whose checkpoints the admin endpoints may load as further loop sets"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")

    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads of torch; without it, as many as are worth it, measured at the start",
    )
    static_shapes: bool | None = Field(
        None,
        description="run loop and decode passes in few fixed shapes, as CUDA graphs on a GPU; without it, where one is",
    )
    slots: int = Field(32, ge=1, le=4096, description="most answers computed at once")
    cache_gib: float = Field(4.0, gt=0, le=4096, description="memory for the keys and values of all slots, in GiB")
    prefix_gib: float = Field(
        0.25, ge=0, le=4096, description="memory for prompts that may come again, in GiB; 0 keeps none"
    )

    max_queue: int = Field(256, ge=1, le=1_000_000, description="most answers that wait; beyond, requests get 429")
    elastic_floor: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of its iteration budget that a request keeps when the queue is half full; 1: always all",
    )
    max_body_bytes: int = Field(1 << 20, ge=1, description="largest request body")
    max_prompts: int = Field(64, ge=1, description="most prompts of one request")
    max_prompt_tokens: int | None = Field(None, ge=1, description="longest prompt; without it, what fits the model")
    max_n: int = Field(16, ge=1, description="largest n of a request")
    max_iterations: int = Field(64, ge=0, description="largest max_iterations of a request")
    max_new_tokens: int = Field(1024, ge=1, description="largest max_new_tokens of a request")
    max_top_tokens: int = Field(50, ge=0, description="largest top_tokens of a trace, and largest logprobs")
    max_state_values: int = Field(
        1 << 20, ge=0, description="most numbers of all states that a trace may return; 0: no states"
    )

    request_timeout_s: float = Field(
        120.0, gt=0, le=86400, allow_inf_nan=False, description="seconds until an unanswered request gets 504"
    )
    stall_timeout_s: float = Field(
        60.0,
        gt=0,
        le=86400,
        allow_inf_nan=False,
        description="seconds without a step, while work is pending, until /livez fails",
    )
    write_timeout_s: float = Field(
        30.0, gt=0, le=3600, allow_inf_nan=False, description="seconds a client may take to read what was sent"
    )
    grace_s: float = Field(
        30.0, ge=0, le=3600, allow_inf_nan=False, description="seconds for running requests to end after SIGTERM"
    )

    api_keys: Keys | None = Field(
        None, description="keys, or sha256:<hex> of keys, separated by commas; with any, requests need one"
    )
    admin_key: Keys | None = Field(
        None, description="key, or sha256:<hex> of it, of the admin endpoints; without it they are off"
    )
    cors_origins: str | None = Field(
        None, description="origins, separated by commas, whose pages may call the server; * for all"
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["text", "json"] = Field("text", description="form of the log's lines")
    otel_endpoint: str | None = Field(
        None, description="OTLP/HTTP collector for spans, as http://host:4318/v1/traces; needs the extra otel"
    )

    @property
    def model_name(self) -> str:
        """The checkpoint's name in responses and metrics: its folder's, or the last part of its hub id."""
        # Not above: it brings torch, and a command line that is only asked for help should not wait for that.
        from slr_core.checkpoint.folder import BUNDLED

        return os.path.basename(os.path.abspath(self.model or BUNDLED))


def split(listed: str) -> list[str]:
    """The parts of a comma-separated setting."""
    return [part.strip() for part in listed.split(",") if part.strip()]


def table() -> str:
    """The settings as a table in Markdown, for docs/server.md."""
    rows = ["| flag | environment | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        flag = f"`--{name.replace('_', '-')}`"
        rows.append(f"| {flag} | `SLR_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
