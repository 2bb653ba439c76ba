// The page: what it knows of the server, its views, and the question that they share.
import "uplot/dist/uPlot.min.css";
import "./style.css";
import { render } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type Checkpoint, getCheckpoint, ServerError, type Settings } from "./api";
import { Batch } from "./batch";
import { Chat } from "./chat";
import { Compare } from "./compare";
import { readFacts, varyQuestion } from "./prosqa";
import { execute, newRun, readFile, readLink, type Run } from "./run";
import { ServerView } from "./server";
import { SettingsForm } from "./settings";
import { Watch } from "./watch";

const VIEWS = ["Chat", "Watch", "Compare", "Batch", "Server"] as const;
type View = (typeof VIEWS)[number];

const RETRY_MS = 1000;
const linked = readLink();

function App() {
  const [view, setView] = useState<View>("Watch");
  const [key, setKey] = useState("");
  const [needsKey, setNeedsKey] = useState(false);
  const [checkpoint, setCheckpoint] = useState<Checkpoint | null>(null);
  const [prompt, setPrompt] = useState(linked?.prompt ?? "");
  const [settings, setSettings] = useState<Settings>(linked?.settings ?? {});
  const [run, setRun] = useState<Run | null>(null);
  const [running, setRunning] = useState(false);
  /** The iteration that the reader has picked; null: the last one, also while more arrive. */
  const [picked, setPicked] = useState<number | null>(null);
  const [error, setError] = useState("");
  const [notice, setNotice] = useState("");
  const abort = useRef<AbortController | null>(null);
  const example = useRef(0);
  const views = useRef<HTMLElement>(null);

  /** Shows what went wrong; null: nothing. */
  const fail = (reason: unknown) => {
    if (reason instanceof ServerError && reason.status === 401) setNeedsKey(true);
    setError(reason === null ? "" : reason instanceof Error ? reason.message : String(reason));
  };
  const connect = async () => {
    fail(null);
    try {
      const found = await getCheckpoint(key);
      setCheckpoint(found);
      if (found.chat && (linked === null || linked.messages)) setView("Chat");
      if (!prompt && found.examples.length) setPrompt(found.examples[0].prompt);
    } catch (reason) {
      fail(reason);
      // 503: the server still loads the model.
      if (reason instanceof ServerError && reason.status === 503) setTimeout(() => void connect(), RETRY_MS);
    }
  };
  useEffect(() => { void connect(); }, []);

  const ask = async () => {
    if (!checkpoint || running) return;
    const { signal } = abort.current = new AbortController();
    fail(null); setNotice(""); setPicked(null); setRunning(true);
    try {
      await execute(checkpoint, newRun(checkpoint, prompt, settings), key, signal, setRun);
    } catch (reason) {
      if (!signal.aborted) fail(reason);
    } finally {
      setRunning(false);
    }
  };
  const openRun = (opened: Run) => {
    abort.current?.abort();
    if (!opened.messages) { setPrompt(opened.prompt); setSettings(opened.settings); }
    setRun(opened); setPicked(null); setView("Watch");
    // The button that was pressed is hidden now.
    views.current?.querySelector("button")?.focus();
    window.scrollTo({ top: 0 });
  };
  const openFile = async (file: File | undefined) => {
    if (!file) return;
    try {
      openRun(readFile(await file.text()));
      fail(null); setNotice(`Showing ${file.name}.`);
    } catch (reason) {
      fail(reason);
    }
  };
  const nextExample = () => {
    const examples = checkpoint!.examples;
    example.current = (example.current + 1) % examples.length;
    setPrompt(examples[example.current].prompt);
  };
  const facts = useMemo(() => readFacts(prompt), [prompt]);
  const asksOne = view === "Watch" || view === "Compare";
  return (
    <main onDragOver={(event) => event.preventDefault()}
      onDrop={(event) => { event.preventDefault(); void openFile(event.dataTransfer?.files[0]); }}>
      <header>
        <h1>Watch a thought converge</h1>
        <p>This model reasons in its hidden state. A loop refines the state until it stops changing; only then are words written.
          {checkpoint && <> Model: <b>{checkpoint.model}</b>. <a href="docs">API reference</a></>}</p>
      </header>
      <nav aria-label="Views" ref={views}>
        {VIEWS.filter((name) => name !== "Chat" || checkpoint?.chat).map((name) => <button key={name} aria-current={name === view ? "page" : undefined} onClick={() => { setView(name); fail(null); }}>{name}</button>)}
      </nav>
      {needsKey && <form class="key" onSubmit={(event) => { event.preventDefault(); void connect(); }}>
        <label>API key <input type="password" autocomplete="off" value={key} onInput={(event) => setKey(event.currentTarget.value)} /></label>
        <button>Use key</button> <small>The key stays in this page's memory.</small>
      </form>}
      {error && <p class="error" role="alert">{error}</p>}
      {checkpoint && !checkpoint.trained && <p class="notice">The loop of this checkpoint is not trained. It is off, and answers are those of
        the base model, unless the settings name a maximum of iterations: then the untrained loop runs, and its answer means nothing.</p>}
      {asksOne && <section aria-label="Question">
        <label class="prompt">Question {checkpoint?.chat && <small>goes to the model as it stands; Chat uses the chat template</small>}
          <textarea rows={5} value={prompt} onInput={(event) => setPrompt(event.currentTarget.value)}
            onKeyDown={(event) => { if (view === "Watch" && event.key === "Enter" && (event.ctrlKey || event.metaKey)) void ask(); }} /></label>
        <div class="buttons">
          {view === "Watch" && (running ? <button class="main" onClick={() => abort.current?.abort()}>Stop</button>
            : <button class="main" disabled={!checkpoint || !prompt.trim()} onClick={() => void ask()}>Ask</button>)}
          {!!checkpoint?.examples.length && <button onClick={nextExample}>Another example</button>}
          {facts && <button onClick={() => setPrompt(varyQuestion(facts))}>New question</button>}
          {view === "Watch" && <label class="file">Open a trace file <input type="file" accept=".json"
            onChange={(event) => void openFile(event.currentTarget.files?.[0])} /></label>}
        </div>
        {view === "Watch" && checkpoint && <SettingsForm checkpoint={checkpoint} settings={settings} change={setSettings} />}
      </section>}
      {notice && view === "Watch" && <p role="status">{notice}</p>}
      {view === "Watch" && !run && checkpoint && <p class="empty">Ask the question, and the iterations of its loop appear here one by one:
        what the state reads as, how far it moved, and why the loop stopped.</p>}
      {view === "Watch" && run && <Watch run={run} running={running} selected={picked ?? run.trace.length}
        select={(iteration) => setPicked(iteration < run.trace.length ? iteration : null)} hasKey={!!key} />}
      {checkpoint && <>
        {checkpoint.chat && <div hidden={view !== "Chat"}><Chat checkpoint={checkpoint} apiKey={key} fail={fail} open={openRun}
          linked={linked?.messages ? { messages: linked.messages, settings: linked.settings } : null} /></div>}
        <div hidden={view !== "Compare"}><Compare checkpoint={checkpoint} prompt={prompt} apiKey={key} fail={fail} open={openRun} /></div>
        <div hidden={view !== "Batch"}><Batch checkpoint={checkpoint} apiKey={key} fail={fail} open={openRun} /></div>
        {view === "Server" && <ServerView apiKey={key} fail={fail} />}
      </>}
    </main>
  );
}

const root = document.getElementById("app")!;
root.replaceChildren();
render(<App />, root);
