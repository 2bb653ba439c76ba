// A conversation with a chat model. Each turn keeps its run, which opens in Watch.
import { useEffect, useRef, useState } from "preact/hooks";
import type { Checkpoint, Message, Settings } from "./api";
import { execute, EXITS, newRun, type Run } from "./run";
import { SettingsForm } from "./settings";

/** A message and its answer; `run` is null in a conversation that was opened from a link. */
interface Turn { user: string; answer: string; run: Run | null }

const STARTERS = ["What is the capital of France?", "Explain in two sentences why the sky is blue.", "Write a haiku about the sea."];

interface ChatProps {
  checkpoint: Checkpoint; apiKey: string; fail: (reason: unknown) => void; open: (run: Run) => void;
  linked: { messages: Message[]; settings: Settings } | null;
}

/** The turns of a conversation, its system message, and a last message without an answer. */
function readMessages(messages: Message[]): { system: string; turns: Turn[]; draft: string } {
  const turns: Turn[] = [];
  let system = "", draft = "";
  for (const { role, content } of messages) {
    if (role === "system") system = content;
    else if (role === "user") draft = content;
    else { turns.push({ user: draft, answer: content, run: null }); draft = ""; }
  }
  return { system, turns, draft };
}

export function Chat({ checkpoint, apiKey, fail, open, linked }: ChatProps) {
  const [start] = useState(() => readMessages(linked?.messages ?? []));
  const [system, setSystem] = useState(start.system);
  const [turns, setTurns] = useState(start.turns);
  const [draft, setDraft] = useState(start.draft);
  const [settings, setSettings] = useState<Settings>(linked?.settings ?? {});
  const [running, setRunning] = useState(false);
  const abort = useRef<AbortController | null>(null), end = useRef<HTMLDivElement>(null), input = useRef<HTMLTextAreaElement>(null);
  useEffect(() => { if (turns.length) end.current?.scrollIntoView({ block: "nearest" }); }, [turns]);

  const send = async (user: string) => {
    if (running || !user.trim()) return;
    const { signal } = abort.current = new AbortController();
    const messages: Message[] = [
      ...(system.trim() ? [{ role: "system" as const, content: system }] : []),
      ...turns.flatMap((turn): Message[] => [{ role: "user", content: turn.user }, { role: "assistant", content: turn.answer }]),
      { role: "user", content: user },
    ];
    let last: Run | null = null;
    const show = (run: Run) => { last = run; setTurns([...turns, { user, answer: run.text, run }]); };
    fail(null); setRunning(true); setDraft("");
    try {
      await execute(checkpoint, newRun(checkpoint, user, settings, messages), apiKey, signal, show);
    } catch (reason) {
      if (!signal.aborted) fail(reason);
      // Nothing was answered: the message can be sent again.
      if (!(last as Run | null)?.text) { setTurns(turns); setDraft(user); }
    } finally {
      setRunning(false);
      input.current?.focus();
    }
  };
  const clear = () => { abort.current?.abort(); setTurns([]); setDraft(""); fail(null); input.current?.focus(); };
  const key = (event: KeyboardEvent) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); void send(draft); }
  };
  return (
    <section aria-label="Chat">
      <details open={!!start.system}>
        <summary>System message{system.trim() ? ": set" : ""}</summary>
        <label>Instruction before the conversation <textarea rows={2} value={system} onInput={(event) => setSystem(event.currentTarget.value)} /></label>
      </details>
      {turns.length === 0 && <div class="empty">
        <p>Nothing has been said yet. Write a message, or begin with one of these:</p>
        <div class="buttons">{STARTERS.map((text) => <button key={text} disabled={running} onClick={() => void send(text)}>{text}</button>)}</div>
      </div>}
      <div role="log" aria-label="Conversation"><ol class="turns">
        {turns.map(({ user, answer, run }, i) => (
          <li key={i}>
            <p class="user"><b>You</b> {user}</p>
            <div class="model">
              <p><b>Model</b> <span>{answer || (running && i === turns.length - 1 ? "Thinking…" : "")}</span></p>
              {run?.result ? <p class="meta">{run.result.iterations === 0 ? "The loop did not run." : `${run.result.iterations} iterations. ${EXITS[run.result.exit_reason] ?? run.result.exit_reason}`}{" "}
                <button onClick={() => open(run)}>Watch turn {i + 1}</button></p>
                : run && !(running && i === turns.length - 1) && <p class="meta">Stopped.</p>}
            </div>
          </li>
        ))}
      </ol></div>
      <div ref={end} />
      <label class="prompt">Message <small>Enter sends it, Shift + Enter begins a new line</small>
        <textarea ref={input} rows={3} value={draft} onInput={(event) => setDraft(event.currentTarget.value)} onKeyDown={key} /></label>
      <div class="buttons">
        {running ? <button class="main" onClick={() => abort.current?.abort()}>Stop</button>
          : <button class="main" disabled={!draft.trim()} onClick={() => void send(draft)}>Send</button>}
        <button disabled={!turns.length} onClick={clear}>Clear</button>
      </div>
      <SettingsForm checkpoint={checkpoint} settings={settings} change={setSettings} />
    </section>
  );
}
