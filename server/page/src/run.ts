// A run: what was asked and what came back; its forms outside the page.
import { type Checkpoint, type Iteration, type Message, type Result, ServerError, type Settings, stream, type TraceResult } from "./api";
import { positionChanges, project, type Projection, readStates, type State } from "./states";

export interface Run {
  /** The text, or the last message of a chat. */
  prompt: string;
  /** The chat; null: there is none. */
  messages: Message[] | null;
  settings: Settings; model: string; criterion: string; threshold: number;
  trace: Iteration[]; text: string; result: Result | null;
  /** The texts of the written tokens. */
  tokens: string[];
  /** In the workspace `token`: the iterations before each written token; else empty. */
  depths: number[];
  /** The states on their first two principal components; null if the run has no states. */
  projection: Projection | null;
  /** Relative change of each position (inner) after each iteration (outer); null if the run has no states. */
  positions: (number | null)[][] | null;
}

/** Iterations of a token's loop that are shown at most. */
const MOST_DEPTH = 512;
const FORMAT = "slr-trace";
/** States are requested if they hold at most so many numbers: about 2 MB of JSON. */
const MOST_STATE_VALUES = 100_000;
/** No token has fewer characters on average. */
const TOKEN_CHARACTERS = 3;
/** Positions whose change is kept. */
const MOST_POSITIONS = 64;
/** In the workspace `token`: tokens whose loops are requested, and likely tokens for each of their iterations. */
const TRACE_TOKENS = 128, TOKEN_TOPS = 12;

export const EXITS: Record<string, string> = {
  converged: "The exit criterion was met, so the loop stopped.",
  max_iterations: "The loop used its maximum of iterations before the exit criterion was met.",
  diverged: "The state grew instead of settling. The answer comes from the last good state.",
};

export function newRun(checkpoint: Checkpoint, prompt: string, settings: Settings, messages: Message[] | null = null): Run {
  const criterion = settings.convergence?.criterion ?? checkpoint.criterion;
  const threshold = settings.convergence?.threshold
    ?? (criterion === checkpoint.criterion ? checkpoint.threshold : checkpoint.criteria[criterion]);
  return {
    prompt, messages, settings, model: settings.loop_set ?? checkpoint.model, criterion, threshold, trace: [], text: "", result: null,
    tokens: [], depths: [], projection: null, positions: null,
  };
}

function wantsStates(checkpoint: Checkpoint, { prompt, messages, settings }: Run): boolean {
  const characters = messages ? messages.reduce((sum, { content }) => sum + content.length, 0) : prompt.length;
  const positions = checkpoint.positions ?? characters / TOKEN_CHARACTERS;
  const values = positions * checkpoint.hidden_size * (settings.max_iterations ?? checkpoint.max_iterations);
  return values <= Math.min(checkpoint.limits.max_state_values, MOST_STATE_VALUES);
}

/** Takes the states out of a result: the run keeps what is shown of them. */
export function withResult(run: Run, { trace, ...result }: TraceResult): { run: Run; states: State[] | null } {
  const states = readStates(trace);
  const changes = states && states[0].length > 1 ? positionChanges(states) : null;
  return {
    states,
    run: {
      ...run, result, text: result.text, trace: trace.map(({ state, ...step }) => step), depths: result.iterations_per_token ?? [],
      projection: states && project(states), positions: changes && changes.map((step) => step.slice(0, MOST_POSITIONS)),
    },
  };
}

/** Runs a prompt; `show` gets the run at most once a frame while it grows. Resolves to its states, if it has them. */
export async function execute(
  checkpoint: Checkpoint, run: Run, key: string, signal: AbortSignal, show: (run: Run) => void,
): Promise<State[] | null> {
  let frame = 0, states: State[] | null = null;
  // They grow in place; what is shown is a copy, made at most once a frame.
  const trace: Iteration[] = [], tokens: string[] = [], depths: number[] = [];
  let text = "";
  const current = (): Run => (run.result ? run : {
    ...run, text, tokens: [...tokens], depths: [...depths], trace: trace.length === run.trace.length ? run.trace : [...trace],
  });
  const draw = () => { frame = 0; show(run = current()); };
  const change = () => { frame ||= requestAnimationFrame(draw); };
  const send = (more: object) => stream(
    { prompt: run.messages ?? run.prompt, ...run.settings, ...more }, key, signal,
    (name, data) => {
      if (name === "iteration") trace.push(data);
      else if (name === "token") {
        text += data.text; tokens.push(data.text);
        if (data.iterations !== undefined) depths.push(data.iterations);
      } else if (name === "result") {
        const found = withResult(current(), data);
        states = found.states; run = found.run;
      }
      change();
    },
  );
  const perToken = checkpoint.workspace === "token";
  let extras: Record<string, unknown> = {
    top_tokens: perToken ? Math.min(TOKEN_TOPS, checkpoint.limits.max_top_tokens) : checkpoint.limits.max_top_tokens,
    ...(wantsStates(checkpoint, run) && { include_states: true }), ...(perToken && { trace_tokens: TRACE_TOKENS }),
  };
  change();
  try {
    for (;;) {
      try {
        await send(extras);
        break;
      } catch (error) {
        // The operator allows less: the answer is shown without it.
        if (!(error instanceof ServerError && error.param !== null && error.param in extras)) throw error;
        const { [error.param]: _, ...rest } = extras;
        extras = rest;
      }
    }
  } finally {
    cancelAnimationFrame(frame);
    draw();
  }
  return states;
}

const quoteShell = (text: string) => `'${text.replaceAll("'", `'\\''`)}'`;

export function toCurl(run: Run, hasKey: boolean): string {
  const body = JSON.stringify({ prompt: run.messages ?? run.prompt, ...run.settings });
  const key = hasKey ? ` -H "authorization: Bearer $SLR_API_KEY"` : "";
  return `curl ${quoteShell(new URL("trace", location.href).href)} -H 'content-type: application/json'${key} -d ${quoteShell(body)}`;
}

function toPythonLiteral(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(toPythonLiteral).join(", ")}]`;
  if (value && typeof value === "object") {
    return `{${Object.entries(value).map(([name, inner]) => `${JSON.stringify(name)}: ${toPythonLiteral(inner)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

export function toPython(run: Run, hasKey: boolean): string {
  const url = JSON.stringify(new URL(".", location.href).href.replace(/\/$/, ""));
  const fields = Object.entries(run.settings).map(([name, value]) => `, ${name}=${toPythonLiteral(value)}`).join("");
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from slr_core.client import Client",
    "",
    `with Client(${url}${hasKey ? `, api_key=os.environ["SLR_API_KEY"]` : ""}) as client:`,
    `    answer = client.trace(${toPythonLiteral(run.messages ?? run.prompt)}${fields})`,
    `    print(answer["results"][0]["text"])`,
    "",
  ].join("\n");
}

const asNumber = (value: unknown) => (typeof value === "number" && Number.isFinite(value) ? value : null);
const asList = (value: unknown): any[] => (Array.isArray(value) ? value : []);

/** The settings that an untrusted object holds. */
function asSettings(value: any): Settings {
  const settings: Settings = {};
  for (const name of ["max_iterations", "temperature", "max_new_tokens"] as const) {
    const number = asNumber(value?.[name]);
    if (number !== null) settings[name] = number;
  }
  if (typeof value?.loop_set === "string") settings.loop_set = value.loop_set;
  const criterion = value?.convergence?.criterion, threshold = asNumber(value?.convergence?.threshold);
  const convergence = { ...(typeof criterion === "string" && { criterion }), ...(threshold !== null && { threshold }) };
  const scale = asNumber(value?.initial_noise?.scale);
  if (scale !== null) settings.initial_noise = { scale };
  return Object.keys(convergence).length ? { ...settings, convergence } : settings;
}

/** The messages that an untrusted value holds; null: it is no chat. */
function asMessages(value: unknown): Message[] | null {
  const isMessage = (item: any) => ["system", "user", "assistant"].includes(item?.role) && typeof item.content === "string";
  return Array.isArray(value) && value.length && value.every(isMessage) ? value.map(({ role, content }) => ({ role, content })) : null;
}

/** A link with the prompt and settings in the fragment, which browsers do not send. */
export function toLink(run: Run): string {
  const fragment = encodeURIComponent(JSON.stringify({ prompt: run.messages ?? run.prompt, settings: run.settings }));
  return `${location.href.split("#")[0]}#${fragment}`;
}

export function readLink(): { prompt: string; messages: Message[] | null; settings: Settings } | null {
  try {
    const { prompt, settings } = JSON.parse(decodeURIComponent(location.hash.slice(1))), messages = asMessages(prompt);
    if (typeof prompt !== "string" && !messages) return null;
    return { prompt: messages ? "" : prompt, messages, settings: asSettings(settings) };
  } catch {
    return null;
  }
}

export const toFile = (run: Run) => JSON.stringify({ format: FORMAT, ...run }, null, 1);

/** Reads a file made by `toFile`; throws an error whose message can be shown. */
export function readFile(text: string): Run {
  let file: any;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.trace)) throw new Error("The file is not a trace from this page.");
  const readStep = (step: any, i: number): Iteration => ({
    t: i + 1,
    relative_change: asNumber(step?.relative_change), cosine: asNumber(step?.cosine), norm: asNumber(step?.norm),
    contraction: asNumber(step?.contraction), kl: asNumber(step?.kl), entropy: asNumber(step?.entropy),
    adapter: step?.adapter == null ? null : String(step.adapter), duration_s: asNumber(step?.duration_s) ?? 0,
    top_tokens: asList(step?.top_tokens).map((top: any) => ({ token: String(top?.token), prob: asNumber(top?.prob) ?? 0 })),
    ...(typeof step?.thought === "string" ? { thought: step.thought } : {}),
  });
  const trace: Iteration[] = file.trace.map(readStep);
  const result = file.result && {
    text: String(file.result.text), iterations: asNumber(file.result.iterations) ?? trace.length,
    exit_reason: String(file.result.exit_reason), final_change: asNumber(file.result.final_change),
    budget_reduced: file.result.budget_reduced === true,
    usage: {
      prompt_tokens: asNumber(file.result.usage?.prompt_tokens) ?? 0,
      completion_tokens: asNumber(file.result.usage?.completion_tokens) ?? 0,
      forward_passes: asNumber(file.result.usage?.forward_passes) ?? 0,
    },
    timings: { total_s: asNumber(file.result.timings?.total_s) ?? 0 },
    ...(file.result.token_traces && { token_traces: asList(file.result.token_traces).map((loop) => asList(loop).map(readStep)) }),
  };
  const pair = (value: unknown): [number, number] => [asNumber(asList(value)[0]) ?? 0, asNumber(asList(value)[1]) ?? 0];
  const points = asList(file.projection?.points).map(pair), positions = asList(file.positions);
  return {
    prompt: String(file.prompt), messages: asMessages(file.messages), settings: asSettings(file.settings), model: String(file.model), criterion: String(file.criterion),
    threshold: asNumber(file.threshold) ?? 0, trace, text: String(file.text ?? ""), result: result ?? null,
    tokens: asList(file.tokens).map(String), depths: asList(file.depths).map((n) => Math.min(MOST_DEPTH, Math.max(0, asNumber(n) ?? 0))),
    projection: points.length && points.length === trace.length ? { points, shares: pair(file.projection.shares) } : null,
    positions: positions.length && positions.length === trace.length
      ? positions.map((step) => asList(step).slice(0, MOST_POSITIONS).map(asNumber)) : null,
  };
}

export function download(name: string, content: Blob): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
