// What the server does now, from /metrics.
import { useEffect, useMemo, useState } from "preact/hooks";
import { getMetrics } from "./api";
import { Chart } from "./chart";
import { byLabel, quantile, readMetrics, since, type Snapshot } from "./metrics";

const EVERY_MS = 2000, KEPT = 61;
const SECONDS = (KEPT - 1) * EVERY_MS / 1000;

export const showSeconds = (value: number | null) => (value === null ? "–" : value < 1 ? `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(1)} s`);
const count = (value: number | undefined) => (value === undefined || Number.isNaN(value) ? "–" : String(Math.round(value)));

/** The table's rows: a label, and its value from the samples of a period. */
const ROWS: [string, (samples: Map<string, number>) => string][] = [
  ["Answers", (s) => count(s.get("slr_loop_iterations_count"))],
  ["Iterations of an answer, mean", (s) => {
    const mean = (s.get("slr_loop_iterations_sum") ?? 0) / (s.get("slr_loop_iterations_count") || NaN);
    return Number.isNaN(mean) ? "–" : mean.toFixed(1);
  }],
  ...(["converged", "max_iterations", "diverged", "cancelled"].map((reason): [string, (s: Map<string, number>) => string] =>
    [`Exits: ${reason}`, (s) => count(byLabel(s, "slr_loop_exits_total", "reason").get(reason))])),
  ["Refused requests", (s) => count([...byLabel(s, "slr_rejections_total", "reason").values()].reduce((sum, x) => sum + x, 0))],
  ["Tokens written", (s) => count(s.get("slr_generated_tokens_total"))],
  ...([["Time of an answer", "slr_request_total_duration_seconds"], ["Time to the first token", "slr_time_to_first_token_seconds"]] as const)
    .flatMap(([label, name]) => [0.5, 0.95].map((q): [string, (s: Map<string, number>) => string] =>
      [`${label}, ${q === 0.5 ? "median" : "95th percentile"}`, (s) => showSeconds(quantile(byLabel(s, `${name}_bucket`, "le"), q))])),
];

export function ServerView({ apiKey, fail }: { apiKey: string; fail: (reason: unknown) => void }) {
  const [history, setHistory] = useState<Snapshot[]>([]);
  useEffect(() => {
    let timer = 0, isGone = false;
    const poll = async () => {
      try {
        if (document.visibilityState === "visible") {
          const snapshot = { time: performance.now(), samples: readMetrics(await getMetrics(apiKey)) };
          if (!isGone) setHistory((kept) => [...kept, snapshot].slice(-KEPT));
        }
      } catch (reason) {
        if (!isGone) fail(reason);
      }
      if (!isGone) timer = window.setTimeout(poll, EVERY_MS);
    };
    void poll();
    return () => { isGone = true; clearTimeout(timer); };
  }, [apiKey]);

  const series = useMemo(() => {
    const last = history.at(-1)?.time ?? 0;
    const gauge = (name: string) => history.map(({ samples }) => samples.get(name) ?? null);
    const rate = (name: string) => history.map(({ time, samples }, i) => {
      const before = history[i - 1];
      return before ? ((samples.get(name) ?? 0) - (before.samples.get(name) ?? 0)) / ((time - before.time) / 1000) : null;
    });
    return {
      x: history.map(({ time }) => (time - last) / 1000),
      answers: [{ label: "running", values: gauge("slr_slots_in_use") }, { label: "waiting", values: gauge("slr_requests_queued"), dashed: true }],
      iterations: [{ label: "iterations per second", values: rate("slr_loop_row_iterations_total") }],
      tokens: [{ label: "tokens per second", values: rate("slr_generated_tokens_total") }],
    };
  }, [history]);
  const now = history.at(-1)?.samples;
  if (!now) return <section aria-label="Server"><p>Reading the metrics…</p></section>;
  const recent = since(now, history[0].samples);
  return (
    <section aria-label="Server">
      <p class="hint">From the server's metrics, every {EVERY_MS / 1000} seconds. {count(now.get("slr_slots_in_use"))} of {count(now.get("slr_slots"))} slots
        are in use, {count(now.get("slr_requests_queued"))} answers wait.</p>
      <div class="charts">
        <Chart title="Answers" note="solid: running, dashed: waiting" x={series.x} series={series.answers} />
        <Chart title="Iterations per second" note="across: seconds before now" x={series.x} series={series.iterations} />
        <Chart title="Tokens per second" note="across: seconds before now" x={series.x} series={series.tokens} />
      </div>
      <div class="scroll" tabIndex={0} role="group" aria-label="Figures">
        <table>
          <thead><tr><th scope="col">Figure</th><th scope="col">While this view is open, at most {SECONDS} s</th><th scope="col">Since the server started</th></tr></thead>
          <tbody>{ROWS.map(([label, value]) => <tr key={label}><th scope="row">{label}</th><td>{value(recent)}</td><td>{value(now)}</td></tr>)}</tbody>
        </table>
      </div>
    </section>
  );
}
