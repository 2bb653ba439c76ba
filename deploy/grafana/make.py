"""The dashboards: `python -m deploy.grafana.make` writes them as the JSON that Grafana is provisioned with."""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.panels import board, heat, lines, mean, now, number, parts, quantile, rate, share

FOLDER = Path(__file__).parent / "dashboards"
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
SECONDS, SHARE, COUNT, ITERATIONS = "s", "percentunit", "short", "short"
EXITS = "slr_loop_exits_total"
ENDED = rate(EXITS, labels='reason!="cancelled"')
LATENCY, FIRST_TOKEN = "slr_request_total_duration_seconds", "slr_time_to_first_token_seconds"
CONTRACTION = "slr_loop_contraction_ratio"


def main() -> None:
    """Write every dashboard."""
    for name, text in render().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def render() -> dict[str, str]:
    """Every dashboard's file name and text."""
    texts = {}
    for dashboard in (overview(), stability(), latency(), capacity()):
        plain = json.loads(json.dumps(dashboard.build(), cls=JSONEncoder))
        for variable in plain["templating"]["list"]:
            for name in ("auto", "auto_count", "auto_min"):  # of interval variables alone
                variable.pop(name, None)
        texts[f"{plain['uid']}.json"] = json.dumps(plain, indent=2, sort_keys=True) + "\n"
    return texts


def quantiles(histogram: str) -> dict[str, str]:
    """The usual quantiles of a histogram, by their names."""
    return {name: quantile(q, histogram) for name, q in QUANTILES.items()}


def overview() -> Dashboard:
    """Whether all is well, at a glance."""
    return board(
        "slr-overview",
        "SLR / Overview",
        "Whether the servers answer, how fast, and whether their loops are stable. The other dashboards say why.",
        {
            "Now": [
                number("Answers", "Answers finished a second, of all prompts and all n.", "ops", ENDED),
                number(
                    "Converged",
                    "Share of loops that stopped because their criterion was met. A fall means harder questions, a "
                    "threshold that is too small, or a loop that has become unstable.",
                    SHARE,
                    share(rate(EXITS, labels='reason="converged"'), ENDED),
                ),
                number(
                    "Diverged",
                    "Share of loops that the divergence guard ended. Should be 0: see Loop stability.",
                    SHARE,
                    share(rate(EXITS, labels='reason="diverged"'), ENDED),
                ),
                number(
                    "Latency p99", "99 of 100 answers took less, waiting included.", SECONDS, quantile(0.99, LATENCY)
                ),
                number("Waiting", "Answers that wait for a slot.", COUNT, now("slr_requests_queued")),
                number("Refused", "HTTP requests refused a second.", "reqps", rate("slr_rejections_total")),
            ],
            "Requests": [
                lines(
                    "Requests by outcome",
                    "HTTP requests a second. `rejected` is the client's fault or a full queue, `error` is ours.",
                    "reqps",
                    {"{{status}}": rate("slr_requests_total", by="status")},
                    stacked=True,
                ),
                lines("Latency", "Time of an answer from its arrival, waiting included.", SECONDS, quantiles(LATENCY)),
                lines(
                    "Refusals by reason",
                    "`queue_full` asks for more servers, `unavailable` is loading, draining or stuck, the rest is the "
                    "client's.",
                    "reqps",
                    {"{{reason}}": rate("slr_rejections_total", by="reason")},
                ),
                lines(
                    "Tokens",
                    "Prompt tokens of finished answers, and tokens written, a second.",
                    "ops",
                    {"prompt": rate("slr_prompt_tokens_total"), "written": rate("slr_generated_tokens_total")},
                ),
            ],
            "Loops": [
                lines(
                    "Exit reasons",
                    "Share of loops by why they ended.",
                    SHARE,
                    {"{{reason}}": parts(EXITS, "reason")},
                    stacked=True,
                    top=1,
                ),
                lines(
                    "Iterations",
                    "Mean iterations of a loop: the compute that a question asks for.",
                    ITERATIONS,
                    {"mean": mean("slr_loop_iterations"), "p95": quantile(0.95, "slr_loop_iterations")},
                ),
            ],
        },
    )


def stability() -> Dashboard:
    """Whether loops settle, and how."""
    return board(
        "slr-stability",
        "SLR / Loop stability",
        "How states move from iteration to iteration. Stable: relative change falls with the iteration, contraction "
        "stays below 1, nothing diverges. docs/operations.md explains each panel.",
        {
            "Depth": [
                heat("Iterations", "How many loops took how many iterations.", ITERATIONS, "slr_loop_iterations"),
                lines(
                    "Exit reasons",
                    "Share of loops by why they ended. `max_iterations` growing: budgets are too small, or thresholds.",
                    SHARE,
                    {"{{reason}}": parts(EXITS, "reason")},
                    stacked=True,
                    top=1,
                ),
                lines(
                    "Iterations saved by early exit",
                    "Of the iterations that converged loops were allowed and all loops ran: what was not needed.",
                    SHARE,
                    {
                        "saved": share(
                            rate("slr_loop_saved_iterations_total"),
                            f"({rate('slr_loop_saved_iterations_total')} + {rate('slr_loop_iterations_sum')})",
                        )
                    },
                    top=1,
                ),
                lines(
                    "Iterations for nothing",
                    "Share of iterations that no answer came of (given up, failed, diverged), and share of answers "
                    "that were allowed fewer iterations than they asked for because the queue was long.",
                    SHARE,
                    {
                        "wasted": share(rate("slr_wasted_row_iterations_total"), rate("slr_loop_row_iterations_total")),
                        "budgets cut, of answers": share(rate("slr_budget_reductions_total"), ENDED),
                    },
                ),
            ],
            "Movement": [
                lines(
                    "Relative change by iteration, median",
                    "How far the state moved, over its length. Falls from iteration to iteration where loops settle.",
                    SHARE,
                    {"t = {{iteration}}": quantile(0.5, "slr_loop_residual_ratio", by="iteration")},
                    log=True,
                ),
                lines(
                    "Relative change by iteration, p95",
                    "The same for the restless 5 of 100.",
                    SHARE,
                    {"t = {{iteration}}": quantile(0.95, "slr_loop_residual_ratio", by="iteration")},
                    log=True,
                ),
                lines(
                    "Contraction by iteration, median",
                    "Length of a move over that of the one before. Below 1 a loop contracts, above 1 it expands.",
                    "none",
                    {"t = {{iteration}}": quantile(0.5, CONTRACTION, by="iteration")},
                ),
                lines(
                    "Share expanding by iteration",
                    "Loops whose contraction was above 1. Some at the first iterations is usual; late ones are a loop "
                    "beyond its trained depth, or one that was not trained to settle.",
                    SHARE,
                    {
                        "t = {{iteration}}": "1 - "
                        + share(
                            rate(f"{CONTRACTION}_bucket", by="iteration", labels='le="1.0"'),
                            rate(f"{CONTRACTION}_count", by="iteration"),
                        )
                    },
                    top=1,
                ),
            ],
            "Trouble": [
                lines(
                    "Divergences",
                    "Loops a second that the guard ended, and those of them that met a state that is not finite.",
                    "ops",
                    {
                        "diverged": rate(EXITS, labels='reason="diverged"'),
                        "not finite": rate("slr_nonfinite_total"),
                    },
                ),
                lines(
                    "State norm by iteration, mean",
                    "Length of the state. Growth from iteration to iteration precedes a divergence.",
                    "none",
                    {"t = {{iteration}}": mean("slr_hidden_state_norm", by="iteration")},
                ),
            ],
        },
    )


def latency() -> Dashboard:
    """Where time goes, and how full steps are."""
    stages = ("queue", "prefill", "loop", "decode")
    return board(
        "slr-latency",
        "SLR / Latency and batching",
        "Where an answer's time goes, and how many answers share a step of the engine.",
        {
            "Answers": [
                lines("Latency", "Time of an answer from its arrival, waiting included.", SECONDS, quantiles(LATENCY)),
                lines(
                    "Time to first token",
                    "From an answer's arrival to its first token.",
                    SECONDS,
                    quantiles(FIRST_TOKEN),
                ),
                lines(
                    "Mean time by stage",
                    "What the mean latency is made of. `queue` growing: more slots or servers; `loop`: more "
                    "iterations, or fuller steps.",
                    SECONDS,
                    {stage: mean(f"slr_request_{stage}_duration_seconds") for stage in stages},
                    stacked=True,
                ),
                lines(
                    "p95 by stage",
                    "Each stage for itself: these do not add up.",
                    SECONDS,
                    {stage: quantile(0.95, f"slr_request_{stage}_duration_seconds") for stage in stages},
                ),
            ],
            "Steps": [
                heat(
                    "Steps by duration",
                    "Every step takes each running answer one pass.",
                    SECONDS,
                    "slr_step_duration_seconds",
                ),
                lines(
                    "Step duration",
                    "All steps, and those in which a loop iterated.",
                    SECONDS,
                    {
                        "p50": quantile(0.5, "slr_step_duration_seconds"),
                        "p95": quantile(0.95, "slr_step_duration_seconds"),
                        "p50 with iterations": quantile(0.5, "slr_iteration_duration_seconds"),
                    },
                ),
                lines(
                    "Answers in a step",
                    "How many answers a step serves, and how many of them iterate. Near the number of slots: full.",
                    COUNT,
                    {"mean": mean("slr_step_rows"), "iterating, mean": mean("slr_iteration_rows")},
                ),
                lines(
                    "Prompt tokens not run again",
                    "Share of prompt tokens whose prefix was at hand: system prompts, repeated questions, n samples.",
                    SHARE,
                    {
                        "reused": share(
                            rate("slr_prefix_reused_tokens_total"),
                            f"({rate('slr_prefix_reused_tokens_total')} + {rate('slr_prefill_tokens_total')})",
                        )
                    },
                    top=1,
                ),
            ],
        },
    )


def capacity() -> Dashboard:
    """How much room is left."""
    return board(
        "slr-capacity",
        "SLR / Capacity",
        "What is used of slots, cache, processor and memory: when to add servers, or slots.",
        {
            "Engine": [
                lines(
                    "Slots",
                    "Answers being computed, and how many could be.",
                    COUNT,
                    {"in use": now("slr_slots_in_use"), "slots": now("slr_slots")},
                ),
                lines(
                    "Waiting",
                    "Answers that wait for a slot, by instance. Not back to 0 for minutes: too few servers.",
                    COUNT,
                    {"{{instance}}": now("slr_requests_queued", by="instance")},
                ),
                lines(
                    "Busy",
                    "Share of time that the engine spends in steps, by instance. At 1 it has no time left, whatever "
                    "the slots say.",
                    SHARE,
                    {"{{instance}}": rate("slr_step_duration_seconds_sum", by="instance")},
                    top=1,
                ),
                lines(
                    "Cache",
                    "Share of the key/value cache that holds something, by instance. Low with all slots in use: slots "
                    "are longer than answers need, so there is memory for more of them.",
                    SHARE,
                    {"{{instance}}": now("slr_kv_slots_tokens_ratio", by="instance")},
                    top=1,
                ),
                lines(
                    "Work",
                    "Iterations and steps a second: the true load, whatever the requests are.",
                    "ops",
                    {
                        "iterations": rate("slr_loop_row_iterations_total"),
                        "steps": rate("slr_step_duration_seconds_count"),
                    },
                ),
                lines(
                    "HTTP requests in flight",
                    "Taken and not yet answered, by instance.",
                    COUNT,
                    {"{{instance}}": now("slr_requests_in_flight", by="instance")},
                ),
            ],
            "Process": [
                lines(
                    "Processor",
                    "Cores in use, by instance.",
                    "none",
                    {"{{instance}}": rate("process_cpu_seconds_total", by="instance")},
                    width=8,
                ),
                lines(
                    "Memory",
                    "Resident memory, by instance. Level once it is warm.",
                    "bytes",
                    {"{{instance}}": now("process_resident_memory_bytes", by="instance")},
                    width=8,
                ),
                lines(
                    "File descriptors",
                    "Open ones, by instance: connections, most of all.",
                    COUNT,
                    {"{{instance}}": now("process_open_fds", by="instance")},
                    width=8,
                ),
            ],
        },
    )


if __name__ == "__main__":
    main()
