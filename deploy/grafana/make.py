"""The dashboards. `python -m deploy.grafana.make` writes them as JSON, from which Grafana is provisioned."""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.builders.timeseries import Panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.panels import (
    build_dashboard,
    gauge,
    heat_map,
    mean,
    quantile,
    rate,
    share,
    share_by,
    single_value,
    time_series,
)

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
    """File name and text of every dashboard."""
    texts = {}
    for dashboard in (overview(), stability(), latency(), capacity()):
        plain = json.loads(json.dumps(dashboard.build(), cls=JSONEncoder))
        for variable in plain["templating"]["list"]:
            for name in ("auto", "auto_count", "auto_min"):  # fields of interval variables only
                variable.pop(name, None)
        texts[f"{plain['uid']}.json"] = json.dumps(plain, indent=2, sort_keys=True) + "\n"
    return texts


def quantiles(histogram: str) -> dict[str, str]:
    """The quantiles :data:`QUANTILES` of a histogram, by name."""
    return {name: quantile(q, histogram) for name, q in QUANTILES.items()}


def answer_latency() -> Panel:
    """The panel of quantiles of an answer's time."""
    return time_series(
        "Latency", "Time from arrival to the complete answer, queueing included.", SECONDS, quantiles(LATENCY)
    )


def overview() -> Dashboard:
    """The state of all servers at a glance."""
    return build_dashboard(
        "slr-overview",
        "SLR / Overview",
        "Whether the servers answer, how fast, and whether their loops are stable. The other dashboards show the "
        "details.",
        {
            "Now": [
                single_value(
                    "Answers",
                    "Answers finished per second. A request with several prompts, or n above 1, has several answers.",
                    "ops",
                    ENDED,
                ),
                single_value(
                    "Converged",
                    "Share of loops that met their exit criterion. If it falls, questions are harder, the threshold "
                    "is too small, or the loop has become unstable.",
                    SHARE,
                    share(rate(EXITS, labels='reason="converged"'), ENDED),
                ),
                single_value(
                    "Diverged",
                    "Share of loops that the divergence guard ended. It should be 0; see the dashboard Loop stability.",
                    SHARE,
                    share(rate(EXITS, labels='reason="diverged"'), ENDED),
                ),
                single_value(
                    "Latency p99",
                    "99 of 100 answers took less time, queueing included.",
                    SECONDS,
                    quantile(0.99, LATENCY),
                ),
                single_value("Queue", "Answers waiting for a slot.", COUNT, gauge("slr_requests_queued")),
                single_value("Refused", "HTTP requests refused per second.", "reqps", rate("slr_rejections_total")),
            ],
            "Requests": [
                time_series(
                    "Requests by outcome",
                    "HTTP requests per second. `rejected`: a client error or a full queue. `error`: a server error.",
                    "reqps",
                    {"{{status}}": rate("slr_requests_total", by="status")},
                    stacked=True,
                ),
                answer_latency(),
                time_series(
                    "Refusals by reason",
                    "`queue_full`: add servers. `unavailable`: the server is loading, draining or stalled. All others "
                    "are client errors.",
                    "reqps",
                    {"{{reason}}": rate("slr_rejections_total", by="reason")},
                ),
                time_series(
                    "Tokens",
                    "Prompt tokens and generated tokens of finished answers, per second.",
                    "ops",
                    {"prompt": rate("slr_prompt_tokens_total"), "generated": rate("slr_generated_tokens_total")},
                ),
            ],
            "Loops": [
                time_series(
                    "Exit reasons",
                    "Share of loops by exit reason.",
                    SHARE,
                    {"{{reason}}": share_by(EXITS, "reason")},
                    stacked=True,
                    top=1,
                ),
                time_series(
                    "Iterations",
                    "Iterations of a loop. They measure the compute that questions need.",
                    ITERATIONS,
                    {"mean": mean("slr_loop_iterations"), "p95": quantile(0.95, "slr_loop_iterations")},
                ),
            ],
        },
    )


def stability() -> Dashboard:
    """Whether loops converge, and how."""
    return build_dashboard(
        "slr-stability",
        "SLR / Loop stability",
        "How the state moves from iteration to iteration. In a stable loop the relative change falls, contraction "
        "stays below 1 and nothing diverges. docs/operations.md explains each panel.",
        {
            "Depth": [
                heat_map("Iterations", "Number of loops by their iterations.", ITERATIONS, "slr_loop_iterations"),
                time_series(
                    "Exit reasons",
                    "Share of loops by exit reason. If `max_iterations` grows, iteration budgets or thresholds are "
                    "too small.",
                    SHARE,
                    {"{{reason}}": share_by(EXITS, "reason")},
                    stacked=True,
                    top=1,
                ),
                time_series(
                    "Iterations saved by early exit",
                    "Share of the allowed iterations that converged loops did not need.",
                    SHARE,
                    {
                        "saved": share(
                            rate("slr_loop_saved_iterations_total"),
                            f"({rate('slr_loop_saved_iterations_total')} + {rate('slr_loop_iterations_sum')})",
                        )
                    },
                    top=1,
                ),
                time_series(
                    "Wasted iterations",
                    "Share of iterations that led to no answer (cancelled, failed or diverged), and share of answers "
                    "whose iteration budget was reduced because the queue was long.",
                    SHARE,
                    {
                        "wasted": share(rate("slr_wasted_row_iterations_total"), rate("slr_loop_row_iterations_total")),
                        "budgets reduced": share(rate("slr_budget_reductions_total"), ENDED),
                    },
                ),
            ],
            "State": [
                time_series(
                    "Relative change by iteration, median",
                    "Distance that the state moved, divided by its norm. It falls from iteration to iteration if "
                    "loops converge, but not with the criterion end_token.",
                    SHARE,
                    {"t = {{iteration}}": quantile(0.5, "slr_loop_residual_ratio", by="iteration")},
                    log=True,
                ),
                time_series(
                    "Relative change by iteration, p95",
                    "The same for the 5 of 100 loops that move most.",
                    SHARE,
                    {"t = {{iteration}}": quantile(0.95, "slr_loop_residual_ratio", by="iteration")},
                    log=True,
                ),
                time_series(
                    "Contraction by iteration, median",
                    "Distance moved in an iteration, divided by that of the previous one. Below 1 the loop contracts, "
                    "above 1 it expands.",
                    "none",
                    {"t = {{iteration}}": quantile(0.5, CONTRACTION, by="iteration")},
                ),
                time_series(
                    "Share expanding by iteration",
                    "Share of loops with a contraction above 1. Some at the first iterations are normal. At late "
                    "iterations the loop is beyond its trained depth, or was not trained to converge.",
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
            "Faults": [
                time_series(
                    "Divergences",
                    "Loops per second that the divergence guard ended, and those among them with a state that is not "
                    "finite.",
                    "ops",
                    {
                        "diverged": rate(EXITS, labels='reason="diverged"'),
                        "not finite": rate("slr_nonfinite_total"),
                    },
                ),
                time_series(
                    "State norm by iteration, mean",
                    "Norm of the state. Growth from iteration to iteration precedes a divergence.",
                    "none",
                    {"t = {{iteration}}": mean("slr_hidden_state_norm", by="iteration")},
                ),
            ],
        },
    )


def latency() -> Dashboard:
    """Where time is spent, and how many answers share a step."""
    stages = ("queue", "prefill", "loop", "decode")
    return build_dashboard(
        "slr-latency",
        "SLR / Latency and batching",
        "Where the time of an answer is spent, and how many answers share a step of the engine.",
        {
            "Answers": [
                answer_latency(),
                time_series(
                    "Time to first token",
                    "Time from arrival to the first token, queueing included.",
                    SECONDS,
                    quantiles(FIRST_TOKEN),
                ),
                time_series(
                    "Mean time by stage",
                    "The parts of the mean latency. If `queue` grows, add slots or servers. If `loop` grows, loops "
                    "take more iterations or steps take longer.",
                    SECONDS,
                    {stage: mean(f"slr_request_{stage}_duration_seconds") for stage in stages},
                    stacked=True,
                ),
                time_series(
                    "p95 by stage",
                    "95th percentile of each stage. The values do not add up to that of the latency.",
                    SECONDS,
                    {stage: quantile(0.95, f"slr_request_{stage}_duration_seconds") for stage in stages},
                ),
            ],
            "Steps": [
                heat_map(
                    "Steps by duration",
                    "Number of steps by their duration. A step runs one forward pass for each running answer.",
                    SECONDS,
                    "slr_step_duration_seconds",
                ),
                time_series(
                    "Step duration",
                    "Duration of all steps, and of those with at least one loop iteration.",
                    SECONDS,
                    {
                        "p50": quantile(0.5, "slr_step_duration_seconds"),
                        "p95": quantile(0.95, "slr_step_duration_seconds"),
                        "p50 with iterations": quantile(0.5, "slr_iteration_duration_seconds"),
                    },
                ),
                time_series(
                    "Answers per step",
                    "Answers that share a step, and those of them in their loop. The limit is the number of slots.",
                    COUNT,
                    {"mean": mean("slr_step_rows"), "in the loop, mean": mean("slr_iteration_rows")},
                ),
                time_series(
                    "Prompt tokens reused",
                    "Share of prompt tokens taken from the prefix cache: system prompts, repeated questions, n "
                    "samples.",
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
    """How much capacity is left."""
    return build_dashboard(
        "slr-capacity",
        "SLR / Capacity",
        "Use of slots, cache, CPU and memory: when to add servers or slots.",
        {
            "Engine": [
                time_series(
                    "Slots",
                    "Answers being computed, and their limit.",
                    COUNT,
                    {"in use": gauge("slr_slots_in_use"), "slots": gauge("slr_slots")},
                ),
                time_series(
                    "Queue",
                    "Answers waiting for a slot, by instance. If it stays above 0 for minutes, add servers.",
                    COUNT,
                    {"{{instance}}": gauge("slr_requests_queued", by="instance")},
                ),
                time_series(
                    "Engine utilization",
                    "Share of time that the engine spends in steps, by instance. At 1 the engine is saturated, even "
                    "with free slots.",
                    SHARE,
                    {"{{instance}}": rate("slr_step_duration_seconds_sum", by="instance")},
                    top=1,
                ),
                time_series(
                    "Cache",
                    "Share of the key/value cache in use, by instance. If it is low with all slots in use, answers "
                    "are shorter than slots, and there is memory for more slots.",
                    SHARE,
                    {"{{instance}}": gauge("slr_kv_slots_tokens_ratio", by="instance")},
                    top=1,
                ),
                time_series(
                    "Iterations and steps",
                    "Loop iterations and engine steps per second. They measure the load independently of the requests.",
                    "ops",
                    {
                        "iterations": rate("slr_loop_row_iterations_total"),
                        "steps": rate("slr_step_duration_seconds_count"),
                    },
                ),
                time_series(
                    "HTTP requests in flight",
                    "HTTP requests received and not yet answered, by instance.",
                    COUNT,
                    {"{{instance}}": gauge("slr_requests_in_flight", by="instance")},
                ),
            ],
            "Process": [
                time_series(
                    "CPU",
                    "CPU cores in use, by instance.",
                    "none",
                    {"{{instance}}": rate("process_cpu_seconds_total", by="instance")},
                    width=8,
                ),
                time_series(
                    "Memory",
                    "Resident memory, by instance. It should be constant after the first minutes.",
                    "bytes",
                    {"{{instance}}": gauge("process_resident_memory_bytes", by="instance")},
                    width=8,
                ),
                time_series(
                    "File descriptors",
                    "Open file descriptors, by instance; most of them are connections.",
                    COUNT,
                    {"{{instance}}": gauge("process_open_fds", by="instance")},
                    width=8,
                ),
            ],
        },
    )


if __name__ == "__main__":
    main()
