import "uplot/dist/uPlot.min.css";
import "./style.css";
import { render } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type Checkpoint, getCheckpoint, ServerError, type Settings, stream } from "./api";
import { download, EXITS, readFile, readLink, type Run, toCurl, toFile, toLink, toPython, toSvg } from "./run";
import { Chart, FactGraph, Lens, readFacts } from "./views";

const linked = readLink();

function App() {
  const [key, setKey] = useState("");
  const [needsKey, setNeedsKey] = useState(false);
  const [checkpoint, setCheckpoint] = useState<Checkpoint | null>(null);
  const [prompt, setPrompt] = useState(linked?.prompt ?? "");
  const [settings, setSettings] = useState<Settings>(linked?.settings ?? {});
  const [run, setRun] = useState<Run | null>(null);
  const [running, setRunning] = useState(false);
  const [selected, setSelected] = useState(0);
  const [error, setError] = useState("");
  const [notice, setNotice] = useState("");
  const abort = useRef<AbortController | null>(null);
  const example = useRef(0);

  const fail = (reason: unknown) => {
    if (reason instanceof ServerError && reason.status === 401) setNeedsKey(true);
    setError(reason instanceof Error ? reason.message : String(reason));
  };
  const connect = async () => {
    setError("");
    try {
      const found = await getCheckpoint(key);
      setCheckpoint(found);
      if (!prompt && found.examples.length) setPrompt(found.examples[0].prompt);
    } catch (reason) {
      fail(reason);
    }
  };
  useEffect(() => { void connect(); }, []);

  const ask = async () => {
    if (!checkpoint || running) return;
    const criterion = settings.convergence?.criterion ?? checkpoint.criterion;
    const threshold = settings.convergence?.threshold
      ?? (criterion === checkpoint.criterion ? checkpoint.threshold : checkpoint.criteria[criterion]);
    let current: Run = {
      prompt, settings, model: settings.loop_set ?? checkpoint.model, criterion, threshold, trace: [], text: "", result: null,
    };
    let frame = 0;
    // One drawing per frame, however fast events arrive.
    const show = (change: Partial<Run>) => {
      current = { ...current, ...change };
      if (!frame) frame = requestAnimationFrame(() => { frame = 0; setRun(current); setSelected(current.trace.length); });
    };
    setRunning(true); setError(""); setNotice(""); show({});
    abort.current = new AbortController();
    try {
      const body = { prompt, ...settings, top_tokens: checkpoint.limits.max_top_tokens, stream: true };
      await stream(body, key, abort.current.signal, (name, data) => {
        if (name === "iteration") show({ trace: [...current.trace, data] });
        else if (name === "token") show({ text: current.text + data.text });
        else if (name === "result") show({ result: data, text: data.text, trace: data.trace });
      });
    } catch (reason) {
      if (!abort.current.signal.aborted) fail(reason);
    } finally {
      setRunning(false);
    }
  };
  const open = async (file: File | undefined) => {
    if (!file) return;
    try {
      const opened = readFile(await file.text());
      setRun(opened); setSelected(opened.trace.length); setError(""); setNotice(`Showing ${file.name}.`);
    } catch (reason) {
      fail(reason);
    }
  };
  const nextExample = () => {
    const examples = checkpoint!.examples;
    example.current = (example.current + 1) % examples.length;
    setPrompt(examples[example.current].prompt);
  };
  return (
    <main onDragOver={(event) => event.preventDefault()}
      onDrop={(event) => { event.preventDefault(); void open(event.dataTransfer?.files[0]); }}>
      <header>
        <h1>Watch a thought converge</h1>
        <p>This model reasons in its hidden state. A loop refines the state until it stops changing; only then are words written.
          {checkpoint && <> Model: <b>{checkpoint.model}</b>. <a href="docs">API reference</a></>}</p>
      </header>
      {needsKey && <form class="key" onSubmit={(event) => { event.preventDefault(); void connect(); }}>
        <label>API key <input type="password" autocomplete="off" value={key} onInput={(event) => setKey(event.currentTarget.value)} /></label>
        <button>Use key</button> <small>The key stays in this page's memory.</small>
      </form>}
      {error && <p class="error" role="alert">{error}</p>}
      <section aria-label="Ask">
        <label class="prompt">Question
          <textarea rows={5} value={prompt} onInput={(event) => setPrompt(event.currentTarget.value)}
            onKeyDown={(event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) void ask(); }} /></label>
        <div class="buttons">
          {running ? <button class="main" onClick={() => abort.current?.abort()}>Stop</button>
            : <button class="main" disabled={!checkpoint || !prompt.trim()} onClick={() => void ask()}>Ask</button>}
          {!!checkpoint?.examples.length && <button onClick={nextExample}>Another example</button>}
          <label class="file">Open a trace file <input type="file" accept=".json" onChange={(event) => void open(event.currentTarget.files?.[0])} /></label>
        </div>
        {checkpoint && <SettingsForm checkpoint={checkpoint} settings={settings} change={setSettings} />}
      </section>
      {notice && <p role="status">{notice}</p>}
      {run && <Watch run={run} running={running} selected={selected} select={setSelected} hasKey={!!key} />}
    </main>
  );
}

function SettingsForm({ checkpoint, settings, change }: {
  checkpoint: Checkpoint; settings: Settings; change: (settings: Settings) => void;
}) {
  const set = (name: keyof Settings, text: string) => {
    const { [name]: _, ...rest } = settings;
    change(text === "" ? rest : { ...rest, [name]: name === "loop_set" ? text : Number(text) });
  };
  const setCriterion = (part: "criterion" | "threshold", text: string) => {
    const { convergence: { [part]: _, ...others } = {}, ...rest } = settings;
    const convergence = text === "" ? others : { ...others, [part]: part === "threshold" ? Number(text) : text };
    change(Object.keys(convergence).length ? { ...rest, convergence } : rest);
  };
  const criterion = settings.convergence?.criterion ?? checkpoint.criterion;
  const threshold = criterion === checkpoint.criterion ? checkpoint.threshold : checkpoint.criteria[criterion];
  const field = (label: string, hint: string, input: preact.ComponentChild) => <label>{label}{input}<small>{hint}</small></label>;
  return (
    <details>
      <summary>Settings</summary>
      <div class="settings">
        {field("Maximum iterations", `0 turns the loop off; trained with ${checkpoint.trained_iterations}`,
          <input type="number" min={0} max={checkpoint.limits.max_iterations} placeholder={String(checkpoint.max_iterations)}
            value={settings.max_iterations ?? ""} onInput={(event) => set("max_iterations", event.currentTarget.value)} />)}
        {field("Criterion", "the distance between two iterations",
          <select value={settings.convergence?.criterion ?? ""} onChange={(event) => setCriterion("criterion", event.currentTarget.value)}>
            <option value="">{checkpoint.criterion} (default)</option>
            {Object.keys(checkpoint.criteria).filter((name) => name !== checkpoint.criterion).map((name) => <option key={name}>{name}</option>)}
          </select>)}
        {field("Threshold", "the loop stops when the distance is below it",
          <input type="number" min={0} step="any" placeholder={String(threshold)} value={settings.convergence?.threshold ?? ""}
            onInput={(event) => setCriterion("threshold", event.currentTarget.value)} />)}
        {field("Temperature", "0 always writes the likeliest token",
          <input type="number" min={0} max={10} step="any" placeholder="0" value={settings.temperature ?? ""}
            onInput={(event) => set("temperature", event.currentTarget.value)} />)}
        {field("Answer tokens", "maximum number of tokens",
          <input type="number" min={1} max={checkpoint.limits.max_new_tokens} placeholder={String(checkpoint.max_new_tokens)}
            value={settings.max_new_tokens ?? ""} onInput={(event) => set("max_new_tokens", event.currentTarget.value)} />)}
        {checkpoint.models.length > 1 && field("Loop adapter set", "the adapters that the loop runs with",
          <select value={settings.loop_set ?? ""} onChange={(event) => set("loop_set", event.currentTarget.value)}>
            <option value="">{checkpoint.model} (default)</option>
            {checkpoint.models.slice(1).map((name) => <option key={name}>{name}</option>)}
          </select>)}
      </div>
    </details>
  );
}

function Watch({ run, running, selected, select, hasKey }: {
  run: Run; running: boolean; selected: number; select: (t: number) => void; hasKey: boolean;
}) {
  const facts = useMemo(() => readFacts(run.prompt), [run.prompt]);
  const [copied, setCopied] = useState("");
  const { trace, result } = run, step = trace[selected - 1];
  const copy = async (name: string, text: string) => {
    try {
      await navigator.clipboard.writeText(text);
      setCopied(`${name} copied.`);
    } catch {
      setCopied(text);
    }
  };
  const savePicture = (kind: "svg" | "png") => {
    const picture = document.querySelector<SVGSVGElement>("[data-picture=lens]")!;
    const text = toSvg(picture), file = new Blob([text], { type: "image/svg+xml" });
    if (kind === "svg") return download("logit-lens.svg", file);
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      canvas.width = 2 * image.width; canvas.height = 2 * image.height;
      const context = canvas.getContext("2d")!;
      context.fillStyle = getComputedStyle(picture).getPropertyValue("--paper");
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => blob && download("logit-lens.png", blob), "image/png");
    };
    image.src = `data:image/svg+xml,${encodeURIComponent(text)}`;
  };
  return (
    <section aria-label="Watch">
      <div class="answer" aria-live="polite">
        <p class="text">{run.text || (running ? "Thinking…" : "")}</p>
        {result && <p>{EXITS[result.exit_reason] ?? result.exit_reason} <b>{result.iterations} iterations</b>, {" "}
          {result.usage.forward_passes} forward passes, {(1000 * result.timings.total_s).toFixed(0)} ms.
          {result.budget_reduced && " The server reduced the iterations because it is busy."}</p>}
      </div>
      {trace.length > 0 && <>
        <label class="scrub">Iteration <b>{selected}</b> of {trace.length}
          <input type="range" min={1} max={trace.length} value={selected} onInput={(event) => select(Number(event.currentTarget.value))} />
        </label>
        {step?.thought !== undefined && <p>Thought in words: <q>{step.thought}</q></p>}
        {facts && <><h2>Facts as a graph</h2>
          <p class="hint">The fuller a node, the likelier it is after this iteration. Thick outline: the person asked about; dashed: the two options.</p>
          <div class="scroll" tabIndex={0} role="group" aria-label="Graph"><FactGraph facts={facts} step={step} /></div></>}
        <h2>How each state reads</h2>
        <p class="hint">The language model's head is applied to the state after each iteration: the probability of each token (logit lens).</p>
        <div class="scroll" tabIndex={0} role="group" aria-label="Logit lens"><Lens trace={trace} selected={selected} select={select} /></div>
        <h2>How the state moves</h2>
        <div class="charts">
          <Chart title="Relative change" note="log scale; dashed: threshold" trace={trace} selected={selected} log
            threshold={run.criterion === "relative_change" ? run.threshold : null} value={(s) => s.relative_change} />
          <Chart title="Contraction" note="below 1 (dashed) the steps shrink" trace={trace} selected={selected} threshold={1} value={(s) => s.contraction} />
          <Chart title="Entropy" note="uncertainty of the next token, nats" trace={trace} selected={selected} value={(s) => s.entropy} />
          <Chart title="Norm" note="length of the state" trace={trace} selected={selected} value={(s) => s.norm} />
        </div>
      </>}
      {result && <div class="buttons">
        <button onClick={() => void copy("curl command", toCurl(run, hasKey))}>Copy as curl</button>
        <button onClick={() => void copy("Python code", toPython(run, hasKey))}>Copy as Python</button>
        <button onClick={() => void copy("Link", toLink(run))}>Link to this run</button>
        <button onClick={() => download("trace.json", new Blob([toFile(run)], { type: "application/json" }))}>Download trace</button>
        {trace.length > 0 && <><button onClick={() => savePicture("svg")}>Picture (SVG)</button>
          <button onClick={() => savePicture("png")}>Picture (PNG)</button></>}
      </div>}
      {copied && <p role="status" class="copied">{copied}</p>}
    </section>
  );
}

const root = document.getElementById("app")!;
root.replaceChildren();
render(<App />, root);
