"""Every setting of the server, its default and its meaning: flags of ``slr-serve`` and ``SLR_…`` alike."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


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
    )

    model: str | None = Field(None, description="checkpoint folder or hub id; prosqa, or none, is the bundled one")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of torch; without it, torch's choice")
    slots: int = Field(32, ge=1, le=4096, description="most answers computed at once")
    max_queue: int = Field(256, ge=1, le=1_000_000, description="most answers that wait; beyond, requests get 429")
    max_body_bytes: int = Field(1 << 20, ge=1, description="largest request body")
    max_prompts: int = Field(64, ge=1, description="most prompts of one request")
    max_n: int = Field(16, ge=1, description="largest n of a request")
    max_iterations: int = Field(64, ge=0, description="largest max_iterations of a request")
    max_new_tokens: int = Field(1024, ge=1, description="largest max_new_tokens of a request")
    max_top_tokens: int = Field(50, ge=0, description="largest top_tokens of a trace")
    max_state_values: int = Field(
        1 << 20, ge=0, description="most numbers of all states that a trace may return; 0: no states"
    )
    request_timeout_s: float = Field(
        120.0, gt=0, le=86400, allow_inf_nan=False, description="seconds until an unanswered request gets 504"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")

    @property
    def model_name(self) -> str:
        """The checkpoint's name in responses and metrics: its folder's, or the last part of its hub id."""
        # Not above: it brings torch, and a command line that is only asked for help should not wait for that.
        from slr_core.checkpoint import BUNDLED

        return os.path.basename(os.path.abspath(self.model or BUNDLED))
