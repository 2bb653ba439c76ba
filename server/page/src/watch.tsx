// One run: its answer and, an iteration at a time, its loop.
import { useMemo, useState } from "preact/hooks";
import { Chart } from "./chart";
import { HeatMap, savePicture } from "./heatmap";
import { readFacts } from "./prosqa";
import { download, EXITS, type Run, toCurl, toFile, toLink, toPython } from "./run";
import { showSeconds } from "./server";
import { FactGraph, lensMap, PathPicture, positionMap, showToken, tokenMap } from "./views";

export function Answer({ run, running }: { run: Run; running: boolean }) {
  const { result } = run;
  return (
    <div class="answer" aria-live="polite">
      <p class="text">{run.text.trimStart() || (running ? "Thinking…" : "")}</p>
      {result && <p>{result.iterations === 0 ? "The loop did not run." : EXITS[result.exit_reason] ?? result.exit_reason} {" "}
        <b>{result.iterations} iterations</b>, {result.usage.forward_passes} forward passes, {showSeconds(result.timings.total_s)}.
        {result.budget_reduced && " The server reduced the iterations because it is busy."}</p>}
    </div>
  );
}

function Charts({ run, selected }: { run: Run; selected: number }) {
  const { trace } = run;
  const of = (value: (step: Run["trace"][number]) => number | null) => [{ label: "", values: trace.map(value) }];
  const series = useMemo(() => [of((s) => s.relative_change), of((s) => s.contraction), of((s) => s.entropy), of((s) => s.norm)], [trace]);
  return (
    <div class="charts">
      <Chart title="Relative change" note="log scale; dotted: threshold" series={series[0]} selected={selected - 1} log
        guide={run.criterion === "relative_change" ? run.threshold : null} />
      <Chart title="Contraction" note="below 1 (dotted) the steps shrink" series={series[1]} selected={selected - 1} guide={1} />
      <Chart title="Entropy" note="uncertainty of the next token, nats" series={series[2]} selected={selected - 1} />
      <Chart title="Norm" note="length of the state" series={series[3]} selected={selected - 1} />
    </div>
  );
}

interface WatchProps { run: Run; running: boolean; selected: number; select: (t: number) => void; hasKey: boolean }

/** The iteration's likeliest token, for the slider. */
function describeStep(trace: Run["trace"], selected: number): string {
  const top = trace[selected - 1]?.top_tokens[0];
  return `${selected} of ${trace.length}${top ? `, likeliest token ${showToken(top.token)}, probability ${top.prob.toFixed(2)}` : ""}`;
}

export function Watch({ run, running, selected, select, hasKey }: WatchProps) {
  const facts = useMemo(() => readFacts(run.prompt), [run.prompt]);
  const [copied, setCopied] = useState("");
  const { trace, result, projection, positions, tokens, depths } = run, step = trace[selected - 1];
  const lens = useMemo(() => lensMap(trace), [trace]);
  const changes = useMemo(() => positions && positionMap(positions), [positions]);
  const loops = useMemo(() => {
    const names = tokens.map((text, i) => text || (result && i === tokens.length - 1 ? "end of answer" : ""));
    return depths.length ? tokenMap(names, depths, result?.token_traces ?? []) : null;
  }, [tokens, depths, result]);
  const copy = async (name: string, text: string) => {
    try {
      await navigator.clipboard.writeText(text);
      setCopied(`${name} copied.`);
    } catch {
      setCopied(text);
    }
  };
  return (
    <section aria-label="Run">
      {run.messages && <p class="hint">A turn of the chat: <q>{run.prompt}</q></p>}
      <Answer run={run} running={running} />
      {trace.length > 0 && <>
        <label class="scrub">Iteration <b>{selected}</b> of {trace.length} <small>drag, or use the arrow keys</small>
          <input type="range" min={1} max={trace.length} value={selected} aria-valuetext={describeStep(trace, selected)}
            onInput={(event) => select(Number(event.currentTarget.value))} />
        </label>
        {step?.thought !== undefined && <p>Thought in words: <q>{step.thought}</q></p>}
        {facts && <><h2>Facts as a graph</h2>
          <p class="hint">The fuller a node, the likelier it is after this iteration. Thick outline: the person asked about; dashed: the two options.</p>
          <div class="scroll" tabIndex={0} role="group" aria-label="Graph"><FactGraph facts={facts} step={step} /></div></>}
        {loops && <>
          <h2>Loop of each token</h2>
          <p class="hint">Every written token runs its own loop: written tokens down, iterations across. A cell shows the likeliest next token
            after that iteration, fuller if it is likelier; the outlined cell is the exit. The views below show the first token.</p>
          <HeatMap map={loops} name="Tokens" caption="token" />
        </>}
        <div class="pair">
          <div>
            <h2>How each state reads</h2>
            <p class="hint">The language model's head is applied to the state after each iteration: the probability of each token (logit lens).</p>
            <HeatMap map={lens} name="Logit lens" selected={selected} select={select} caption="token" />
          </div>
          {projection && <div>
            <h2>Path of the state</h2>
            <p class="hint">All states on their two principal components. {result?.exit_reason === "converged" && "Ring: the state at which the exit criterion was met."}</p>
            <div class="frame"><PathPicture shares={projection.shares} selected={selected}
              paths={[{ label: "run", points: projection.points, settled: result?.exit_reason === "converged" }]} /></div>
          </div>}
        </div>
        {changes && <>
          <h2>Change of each position</h2>
          <p class="hint">Relative change per position of the workspace, on a log scale: full cells still move, empty ones have settled.</p>
          <HeatMap map={changes} name="Positions" selected={selected} select={select} caption="position" />
        </>}
        <h2>How the state moves</h2>
        <Charts run={run} selected={selected} />
      </>}
      {result && <div class="buttons">
        <button onClick={() => void copy("curl command", toCurl(run, hasKey))}>Copy as curl</button>
        <button onClick={() => void copy("Python code", toPython(run, hasKey))}>Copy as Python</button>
        <button onClick={() => void copy("Link", toLink(run))}>Link to this run</button>
        <button onClick={() => download("trace.json", new Blob([toFile(run)], { type: "application/json" }))}>Download trace</button>
        {trace.length > 0 && <>
          <button onClick={() => savePicture(loops ?? lens, "svg")}>Picture (SVG)</button>
          <button onClick={() => savePicture(loops ?? lens, "png")}>Picture (PNG)</button>
        </>}
      </div>}
      {copied && <p role="status" class="copied">{copied}</p>}
    </section>
  );
}
