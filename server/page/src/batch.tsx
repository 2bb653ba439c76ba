// Many questions with known answers: accuracy, iterations, and the questions that were wrong or did not converge.
import { useRef, useState } from "preact/hooks";
import { type Checkpoint, post, type Result, ServerError, type Settings, type TraceResult } from "./api";
import { Chart } from "./chart";
import { newRun, type Run, withResult } from "./run";
import { SettingsForm } from "./settings";

export interface Question {
  prompt: string; answer: string | null;
  /** The whole line, for the task's rule. */
  fields: Record<string, unknown>;
}
interface Row { question: Question; run: Run | null; correct: boolean | null; error: string }

const MOST_QUESTIONS = 2000, AT_ONCE = 4, TOP_TOKENS = 10, MOST_SHOWN = 200, LONGEST_TEXT = 20_000;

/** Reads JSON lines with `question` (or `prompt`) and `answer`; throws an error whose message can be shown. */
export function readQuestions(text: string): Question[] {
  const lines = text.split("\n").map((line, i) => ({ line: line.trim(), number: i + 1 })).filter(({ line }) => line);
  if (lines.length > MOST_QUESTIONS) throw new Error(`At most ${MOST_QUESTIONS} questions can be run.`);
  return lines.map(({ line, number }) => {
    let object: any;
    try {
      object = JSON.parse(line);
    } catch {
      throw new Error(`Line ${number} is not JSON.`);
    }
    const prompt = object?.prompt ?? object?.question;
    if (typeof prompt !== "string") throw new Error(`Line ${number} has no "question".`);
    const { prompt: _, ...fields } = object, answer = object.answer == null ? null : String(object.answer);
    return { prompt, answer, fields: { ...fields, question: prompt, answer } };
  });
}

interface Grades { task: string; correct: boolean[] }
const GRADED_AT_ONCE = 64;

/** Whether each text answers its question, by the rule of a task on the server; null where no answer is known. */
async function grade(questions: Question[], texts: string[], task: string, key: string, signal: AbortSignal): Promise<(boolean | null)[]> {
  const known = questions.flatMap(({ answer }, i) => (answer === null ? [] : [i])), grades: (boolean | null)[] = questions.map(() => null);
  if (!known.length) return grades;
  const body = { questions: known.map((i) => questions[i].fields), texts: known.map((i) => texts[i].slice(-LONGEST_TEXT)), task };
  (await post<Grades>("grade", body, key, signal)).correct.forEach((correct, k) => { grades[known[k]] = correct; });
  return grades;
}

/** The task whose rule grades these questions: the one that their fields tell. Throws the server's error if they cannot be graded. */
async function findTask(questions: Question[], task: string | undefined, key: string, signal: AbortSignal): Promise<string> {
  const known = questions.filter(({ answer }) => answer !== null).slice(0, GRADED_AT_ONCE);
  if (!known.length) return task ?? "text";
  const body = { questions: known.map(({ fields }) => fields), texts: known.map(() => ""), ...(task && { task }) };
  return (await post<Grades>("grade", body, key, signal)).task;
}

interface BatchProps {
  checkpoint: Checkpoint; apiKey: string; fail: (reason: unknown) => void; open: (run: Run) => void;
}

export function Batch({ checkpoint, apiKey, fail, open }: BatchProps) {
  const [text, setText] = useState("");
  const [settings, setSettings] = useState<Settings>({});
  const [rows, setRows] = useState<Row[]>([]);
  const [total, setTotal] = useState(0);
  const [depths, setDepths] = useState<number[]>([]);
  const [running, setRunning] = useState(false);
  const [showAll, setShowAll] = useState(false);
  const [chosenTask, setChosenTask] = useState("");
  const [task, setTask] = useState("");
  const abort = useRef<AbortController | null>(null);

  const guard = async (work: (signal: AbortSignal) => Promise<void>) => {
    const { signal } = abort.current = new AbortController();
    fail(null); setRunning(true);
    try {
      await work(signal);
    } catch (reason) {
      if (!signal.aborted) fail(reason);
      abort.current.abort();
    } finally {
      setRunning(false);
    }
  };
  const run = () => guard(async (signal) => {
    const questions = readQuestions(text);
    const found: Row[] = [], rule = await findTask(questions, chosenTask || undefined, apiKey, signal);
    setTask(rule); setRows([]); setDepths([]); setTotal(questions.length);
    const next = questions.entries();
    const work = async () => {
      for (const [i, question] of next) {
        found[i] = await ask(checkpoint, question, settings, rule, apiKey, signal);
        setRows(found.filter(Boolean));
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
  });
  const sweep = () => guard(async (signal) => {
    const graded = rows.map((row) => row.question).filter((question) => question.answer !== null);
    const last = settings.max_iterations ?? checkpoint.max_iterations, size = Math.min(checkpoint.limits.max_prompts, 16);
    const accuracies: number[] = [];
    for (let t = 0; t <= last; t++) {
      let correct = 0;
      for (let start = 0; start < graded.length; start += size) {
        const part = graded.slice(start, start + size);
        const body = { ...settings, prompt: part.map(({ prompt }) => prompt), max_iterations: t, convergence: { criterion: "fixed" } };
        const { results } = await post<{ results: Result[] }>("generate", body, apiKey, signal);
        correct += (await grade(part, results.map(({ text }) => text), task, apiKey, signal)).filter(Boolean).length;
      }
      accuracies.push(correct / graded.length);
      setDepths([...accuracies]);
    }
  });
  const read = async (file: File | undefined) => {
    if (!file) return;
    const packed = file.name.endsWith(".gz");
    setText(await new Response(packed ? file.stream().pipeThrough(new DecompressionStream("gzip")) : file).text());
  };
  const useExamples = () => setText(checkpoint.examples.map(({ prompt, answer }) => JSON.stringify({ question: prompt, answer })).join("\n"));
  const wanted = rows.filter((row) => showAll || row.error || row.correct === false || row.run?.result?.exit_reason !== "converged");
  return (
    <section aria-label="Batch" onDragOver={(event) => event.preventDefault()}
      onDrop={(event) => { event.preventDefault(); event.stopPropagation(); void read(event.dataTransfer?.files[0]).catch(fail); }}>
      <label class="prompt">Questions <small>JSON lines with "question" and "answer"; paste them, or drop a .jsonl or .jsonl.gz file</small>
        <textarea rows={6} value={text} spellcheck={false} onInput={(event) => setText(event.currentTarget.value)}
          placeholder={'{"question": "…", "answer": "…"}'} /></label>
      <div class="buttons">
        {running ? <button class="main" onClick={() => abort.current?.abort()}>Stop</button>
          : <button class="main" disabled={!text.trim()} onClick={() => void run()}>Run all</button>}
        {!!checkpoint.examples.length && <button onClick={useExamples}>Use the examples</button>}
        <label class="file">Open a file <input type="file" accept=".jsonl,.gz,.json,.txt" onChange={(event) => void read(event.currentTarget.files?.[0]).catch(fail)} /></label>
      </div>
      <label class="task">Graded by the rule of the task <select value={chosenTask} onChange={(event) => setChosenTask(event.currentTarget.value)}>
        <option value="">automatic: told by the questions' fields, else text</option>
        {checkpoint.tasks.map((name) => <option key={name}>{name}</option>)}
      </select><small>as <code>slr eval</code> grades; text: equal apart from case, spaces and punctuation</small></label>
      <SettingsForm checkpoint={checkpoint} settings={settings} change={setSettings} />
      {total > 0 && <>
        <p role="status"><progress max={total} value={rows.length} aria-label="Questions answered" /> {rows.length} of {total}. <b>{summarise(rows)}</b> Graded as {task}.</p>
        <div class="pair">
          <div class="frame"><h2>Iterations</h2><p class="hint">Answers by the iterations of their loop. Full: correct; hatched: wrong or not graded.</p><Histogram rows={rows} /></div>
          <div class="frame"><h2>Accuracy against iterations</h2>
            {depths.length > 0 ? <Chart title="Accuracy" note="every question with exactly this number of iterations" x={depths.map((_, t) => t)}
              series={[{ label: "share correct", values: depths }]} />
              : <p class="hint">Answers every question again with 0, 1, 2, … iterations.</p>}
            {!running && rows.some((row) => row.correct !== null) && depths.length === 0 && <button onClick={() => void sweep()}>Measure</button>}
          </div>
        </div>
        <h2>Wrong or not converged</h2>
        <label><input type="checkbox" checked={showAll} onChange={(event) => setShowAll(event.currentTarget.checked)} /> Show all questions</label>
        {wanted.length === 0 ? <p>None.</p> : <div class="scroll tall" tabIndex={0} role="group" aria-label="Questions">
          <table>
            <thead><tr><th scope="col">Question</th><th scope="col">Expected</th><th scope="col">Answer</th><th scope="col">Iterations</th><th scope="col">Exit</th><th scope="col">Loop</th></tr></thead>
            <tbody>{wanted.slice(0, MOST_SHOWN).map(({ question, run, correct, error }, i) => (
              <tr key={i} class={correct === false || error ? "differs" : undefined}>
                <td title={question.prompt}>{question.prompt.length > 60 ? `…${question.prompt.slice(-60)}` : question.prompt}</td>
                <td>{question.answer ?? "–"}</td><td>{error || run?.text} {correct === false && <b>wrong</b>}</td>
                <td>{run?.result?.iterations ?? "–"}</td><td>{run?.result?.exit_reason ?? "–"}</td>
                <td>{run && <button onClick={() => open(run)}>Watch</button>}</td>
              </tr>
            ))}</tbody>
          </table>
          {wanted.length > MOST_SHOWN && <p>{wanted.length - MOST_SHOWN} more.</p>}
        </div>}
      </>}
    </section>
  );
}

/** Answers one question. A refusal of this question alone becomes its row's error. */
async function ask(checkpoint: Checkpoint, question: Question, settings: Settings, task: string, key: string, signal: AbortSignal): Promise<Row> {
  const run = newRun(checkpoint, question.prompt, settings);
  try {
    const top_tokens = Math.min(checkpoint.limits.max_top_tokens, TOP_TOKENS);
    const { results: [result] } = await post<{ results: TraceResult[] }>("trace", { prompt: question.prompt, ...settings, top_tokens }, key, signal);
    const [correct] = await grade([question], [result.text], task, key, signal);
    return { question, run: withResult(run, result).run, correct, error: "" };
  } catch (error) {
    if (error instanceof ServerError && error.status === 400 && error.param?.startsWith("prompt")) {
      return { question, run: null, correct: null, error: error.message };
    }
    throw error;
  }
}

function summarise(rows: Row[]): string {
  const graded = rows.filter((row) => row.correct !== null), correct = graded.filter((row) => row.correct).length;
  const results = rows.flatMap((row) => row.run?.result ?? []);
  const mean = results.reduce((sum, result) => sum + result.iterations, 0) / results.length;
  const open = results.filter((result) => result.exit_reason !== "converged").length;
  return [
    graded.length && `${correct} of ${graded.length} correct (${Math.round((100 * correct) / graded.length)} %).`,
    results.length && `${mean.toFixed(1)} iterations on average, ${open} not converged.`,
  ].filter(Boolean).join(" ");
}

const BAR = 34, PLOT = 130;

function Histogram({ rows }: { rows: Row[] }) {
  const counts: { all: number; correct: number }[] = [];
  for (const { run, correct } of rows) {
    if (!run?.result) continue;
    while (counts.length <= run.result.iterations) counts.push({ all: 0, correct: 0 });
    const count = counts[run.result.iterations];
    count.all++;
    if (correct) count.correct++;
  }
  const most = Math.max(1, ...counts.map(({ all }) => all)), width = Math.max(1, counts.length) * BAR;
  return (
    <div class="scroll" tabIndex={0} role="group" aria-label="Histogram">
      <svg class="histogram" width={width} height={PLOT + 42} viewBox={`0 0 ${width} ${PLOT + 42}`} role="img"
        aria-label={counts.flatMap(({ all, correct }, t) => (all ? [`${t} iterations: ${all} answers, ${correct} correct`] : [])).join("; ")}>
        <defs><pattern id="hatch" width={6} height={6} patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><line y2={6} stroke="currentColor" stroke-width={2} /></pattern></defs>
        {counts.map(({ all, correct }, t) => {
          const x = t * BAR + 4, height = (PLOT * all) / most, full = (PLOT * correct) / most, y = PLOT + 18 - height;
          return (
            <g key={t}>
              {all > 0 && <>
                <rect x={x} y={y} width={BAR - 8} height={height - full} fill="url(#hatch)" stroke="currentColor" />
                <rect x={x} y={y + height - full} width={BAR - 8} height={full} fill="var(--accent)" />
                <text x={x + BAR / 2 - 4} y={y - 4} text-anchor="middle" font-size={11} fill="currentColor">{all}</text>
              </>}
              <text x={x + BAR / 2 - 4} y={PLOT + 34} text-anchor="middle" font-size={12} fill="currentColor">{t}</text>
            </g>
          );
        })}
      </svg>
    </div>
  );
}
