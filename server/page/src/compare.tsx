// Two runs of one prompt under different settings, side by side.
import { useMemo, useRef, useState } from "preact/hooks";
import type { Checkpoint, Settings } from "./api";
import { Chart, type Series } from "./chart";
import { execute, newRun, type Run } from "./run";
import { describeSettings, SettingsForm } from "./settings";
import { distances, project, type State } from "./states";
import { type Path, PathPicture, showToken } from "./views";
import { Answer } from "./watch";

/** Noise of "Perturb", as a multiple of the RMS of the initial state. */
const NOISE = 0.3;
const NAMES = ["A", "B"] as const;
type Two<T> = [T, T];

interface CompareProps {
  checkpoint: Checkpoint; prompt: string; apiKey: string; fail: (reason: unknown) => void; open: (run: Run) => void;
}

export function Compare({ checkpoint, prompt, apiKey, fail, open }: CompareProps) {
  const [settings, setSettings] = useState<Two<Settings>>([{}, { max_iterations: 0 }]);
  const [runs, setRuns] = useState<Two<Run | null>>([null, null]);
  const [states, setStates] = useState<Two<State[] | null>>([null, null]);
  const [running, setRunning] = useState(false);
  const abort = useRef<AbortController | null>(null);

  const compare = async () => {
    const { signal } = abort.current = new AbortController();
    fail(null); setRunning(true); setRuns([null, null]); setStates([null, null]);
    const put = <T,>(pair: Two<T>, side: number, value: T): Two<T> => (side ? [pair[0], value] : [value, pair[1]]);
    try {
      await Promise.all(settings.map(async (chosen, side) => {
        const found = await execute(checkpoint, newRun(checkpoint, prompt, chosen), apiKey, signal,
          (run) => setRuns((pair) => put(pair, side, run)));
        setStates((pair) => put(pair, side, found));
      }));
    } catch (reason) {
      if (!signal.aborted) fail(reason);
      abort.current.abort();
    } finally {
      setRunning(false);
    }
  };
  const [a, b] = runs, isDone = !running && a?.result && b?.result;
  return (
    <section aria-label="Compare">
      <div class="sides">
        {NAMES.map((name, side) => (
          <fieldset key={name}>
            <legend>{name}: {describeSettings(settings[side])}</legend>
            <SettingsForm checkpoint={checkpoint} settings={settings[side]} title={`Settings of ${name}`}
              change={(changed) => setSettings(side ? [settings[0], changed] : [changed, settings[1]])} />
            {side === 1 && <div class="buttons">
              <button onClick={() => setSettings([settings[0], { ...settings[0], max_iterations: 0 }])}>Loop off</button>
              {checkpoint.workspace !== "token" && <button
                onClick={() => setSettings([settings[0], { ...settings[0], initial_noise: { scale: NOISE } }])}>Perturb</button>}
              {checkpoint.models.slice(1).map((model) => (
                <button key={model} onClick={() => setSettings([settings[0], { ...settings[0], loop_set: model }])}>Adapters {model}</button>
              ))}
            </div>}
          </fieldset>
        ))}
      </div>
      <div class="buttons">
        {running ? <button class="main" onClick={() => abort.current?.abort()}>Stop</button>
          : <button class="main" disabled={!prompt.trim()} onClick={() => void compare()}>Compare</button>}
      </div>
      <div class="sides">
        {runs.map((run, side) => run && (
          <section key={NAMES[side]} aria-label={`Answer ${NAMES[side]}`}>
            <h2>{NAMES[side]}: {describeSettings(run.settings)}</h2>
            <Answer run={run} running={running} />
            {run.result && <button onClick={() => open(run)}>Open {NAMES[side]} in Watch</button>}
          </section>
        ))}
      </div>
      {isDone && <Difference a={a} b={b} states={states} />}
    </section>
  );
}

/** Where two runs part, in words. */
export function describeParting(a: Run, b: Run): string {
  const answers = a.text === b.text ? "The answers are the same." : "The answers differ.";
  if (!a.trace.length || !b.trace.length) return `${answers} ${a.trace.length ? "B" : b.trace.length ? "A" : "Neither"} has no loop.`;
  const shorter = Math.min(a.trace.length, b.trace.length);
  for (let i = 0; i < shorter; i++) {
    const [first, second] = [a.trace[i].top_tokens[0], b.trace[i].top_tokens[0]];
    if (first && second && first.token !== second.token) {
      return `${answers} The paths part after iteration ${i + 1}: A reads “${showToken(first.token)}”, B reads “${showToken(second.token)}”.`;
    }
  }
  return `${answers} The likeliest token is the same after each of the first ${shorter} iterations.`;
}

function Difference({ a, b, states }: { a: Run; b: Run; states: Two<State[] | null> }) {
  const pair = (name: "relative_change" | "entropy"): Series[] => [
    { label: "A", values: a.trace.map((step) => step[name]) }, { label: "B", values: b.trace.map((step) => step[name]), dashed: true },
  ];
  const changes = useMemo(() => pair("relative_change"), [a, b]), entropies = useMemo(() => pair("entropy"), [a, b]);
  const apart = useMemo(() => [{ label: "distance", values: distances(...states) }], [states]);
  const picture = useMemo(() => {
    const projected = project([...states[0] ?? [], ...states[1] ?? []]), cut = states[0]?.length ?? 0;
    if (!projected) return null;
    const paths: Path[] = [
      { label: "A", points: projected.points.slice(0, cut), settled: a.result?.exit_reason === "converged" },
      { label: "B", points: projected.points.slice(cut), settled: b.result?.exit_reason === "converged", dashed: true },
    ];
    return <PathPicture paths={paths} shares={projected.shares} />;
  }, [a, b, states]);
  const length = Math.max(a.trace.length, b.trace.length), isApart = apart[0].values.some((value) => value !== null);
  const top = (run: Run, i: number) => {
    const token = run.trace[i]?.top_tokens[0];
    return token ? `${showToken(token.token)} ${token.prob.toFixed(2)}` : "–";
  };
  return (
    <section aria-label="Difference">
      <h2>Where the paths part</h2>
      <p class="parting"><b>{describeParting(a, b)}</b></p>
      {length > 0 && <>
        <div class="pair">
          <div class="scroll tall" tabIndex={0} role="group" aria-label="Likeliest tokens">
            <table>
              <caption>Likeliest token after each iteration</caption>
              <thead><tr><th scope="col">Iteration</th><th scope="col">A</th><th scope="col">B</th></tr></thead>
              <tbody>{Array.from({ length }, (_, i) => {
                const differs = a.trace[i]?.top_tokens[0]?.token !== b.trace[i]?.top_tokens[0]?.token;
                return <tr key={i} class={differs ? "differs" : undefined}><th scope="row">{i + 1}{differs && " ≠"}</th><td>{top(a, i)}</td><td>{top(b, i)}</td></tr>;
              })}</tbody>
            </table>
          </div>
          {picture && <div class="frame">{picture}<p class="hint">Paths of the states on their principal components. Circles: A; squares: B; ring: exit criterion met.</p></div>}
        </div>
        <div class="charts">
          <Chart title="Relative change" note="log scale; solid: A, dashed: B" series={changes} log />
          <Chart title="Entropy" note="nats; solid: A, dashed: B" series={entropies} />
          {isApart && <Chart title="Distance" note="between the states of A and B, relative to A; log scale" series={apart} log />}
        </div>
      </>}
    </section>
  );
}
