// A run: what was asked and what came back; its forms outside the page.
import { type Checkpoint, type Iteration, type Result, ServerError, type Settings, stream, type TraceResult } from "./api";
import { positionChanges, project, type Projection, readStates, type State } from "./states";

export interface Run {
  prompt: string; settings: Settings; model: string; criterion: string; threshold: number;
  trace: Iteration[]; text: string; result: Result | null;
  /** The texts of the written tokens. */
  tokens: string[];
  /** The states on their first two principal components; null if the run has no states. */
  projection: Projection | null;
  /** Relative change of each position (inner) after each iteration (outer); null if the run has no states. */
  positions: (number | null)[][] | null;
}

const FORMAT = "slr-trace";
/** States are requested if they hold at most so many numbers: about 2 MB of JSON. */
const MOST_STATE_VALUES = 100_000;
/** No token has fewer characters on average. */
const TOKEN_CHARACTERS = 3;
/** Positions whose change is kept. */
const MOST_POSITIONS = 64;

export const EXITS: Record<string, string> = {
  converged: "The state stopped changing, so the loop stopped.",
  max_iterations: "The loop used its maximum of iterations before the state stopped changing.",
  diverged: "The state grew instead of settling. The answer comes from the last good state.",
};

export function newRun(checkpoint: Checkpoint, prompt: string, settings: Settings): Run {
  const criterion = settings.convergence?.criterion ?? checkpoint.criterion;
  const threshold = settings.convergence?.threshold
    ?? (criterion === checkpoint.criterion ? checkpoint.threshold : checkpoint.criteria[criterion]);
  return {
    prompt, settings, model: settings.loop_set ?? checkpoint.model, criterion, threshold, trace: [], text: "", result: null,
    tokens: [], projection: null, positions: null,
  };
}

function wantsStates(checkpoint: Checkpoint, { prompt, settings }: Run): boolean {
  const positions = checkpoint.positions ?? prompt.length / TOKEN_CHARACTERS;
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
      ...run, result, text: result.text, trace: trace.map(({ state, ...step }) => step),
      projection: states && project(states), positions: changes && changes.map((step) => step.slice(0, MOST_POSITIONS)),
    },
  };
}

/** Runs a prompt; `show` gets the run at most once a frame while it grows. Resolves to its states, if it has them. */
export async function execute(
  checkpoint: Checkpoint, run: Run, key: string, signal: AbortSignal, show: (run: Run) => void,
): Promise<State[] | null> {
  let frame = 0, states: State[] | null = null;
  const change = (changed: Run) => {
    run = changed;
    if (!frame) frame = requestAnimationFrame(() => { frame = 0; show(run); });
  };
  const send = (more: object) => stream(
    { prompt: run.prompt, ...run.settings, top_tokens: checkpoint.limits.max_top_tokens, ...more }, key, signal,
    (name, data) => {
      if (name === "iteration") change({ ...run, trace: [...run.trace, data] });
      else if (name === "token") change({ ...run, text: run.text + data.text, tokens: [...run.tokens, data.text] });
      else if (name === "result") {
        const found = withResult(run, data);
        states = found.states;
        change(found.run);
      }
    },
  );
  change(run);
  try {
    await send(wantsStates(checkpoint, run) ? { include_states: true } : {});
  } catch (error) {
    if (!(error instanceof ServerError && error.param === "include_states")) throw error;
    await send({});
  } finally {
    cancelAnimationFrame(frame);
    show(run);
  }
  return states;
}

const quoteShell = (text: string) => `'${text.replaceAll("'", `'\\''`)}'`;

export function toCurl(run: Run, hasKey: boolean): string {
  const body = JSON.stringify({ prompt: run.prompt, ...run.settings });
  const key = hasKey ? ` -H "authorization: Bearer $SLR_API_KEY"` : "";
  return `curl ${quoteShell(new URL("trace", location.href).href)} -H 'content-type: application/json'${key} -d ${quoteShell(body)}`;
}

function toPythonLiteral(value: unknown): string {
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
    `    answer = client.trace(${JSON.stringify(run.prompt)}${fields})`,
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

/** A link with the prompt and settings in the fragment, which browsers do not send. */
export function toLink(run: Run): string {
  const fragment = encodeURIComponent(JSON.stringify({ prompt: run.prompt, settings: run.settings }));
  return `${location.href.split("#")[0]}#${fragment}`;
}

export function readLink(): { prompt: string; settings: Settings } | null {
  try {
    const { prompt, settings } = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    return typeof prompt === "string" ? { prompt, settings: asSettings(settings) } : null;
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
  const trace = file.trace.map((step: any, i: number): Iteration => ({
    t: i + 1,
    relative_change: asNumber(step?.relative_change), cosine: asNumber(step?.cosine), norm: asNumber(step?.norm),
    contraction: asNumber(step?.contraction), kl: asNumber(step?.kl), entropy: asNumber(step?.entropy),
    adapter: step?.adapter == null ? null : String(step.adapter), duration_s: asNumber(step?.duration_s) ?? 0,
    top_tokens: asList(step?.top_tokens).map((top: any) => ({ token: String(top?.token), prob: asNumber(top?.prob) ?? 0 })),
    ...(typeof step?.thought === "string" ? { thought: step.thought } : {}),
  }));
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
    ...(file.result.iterations_per_token && { iterations_per_token: asList(file.result.iterations_per_token).map((n) => asNumber(n) ?? 0) }),
  };
  const pair = (value: unknown): [number, number] => [asNumber(asList(value)[0]) ?? 0, asNumber(asList(value)[1]) ?? 0];
  const points = asList(file.projection?.points).map(pair), positions = asList(file.positions);
  return {
    prompt: String(file.prompt), settings: asSettings(file.settings), model: String(file.model), criterion: String(file.criterion),
    threshold: asNumber(file.threshold) ?? 0, trace, text: String(file.text ?? ""), result: result ?? null,
    tokens: asList(file.tokens).map(String),
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

/** The picture as a file of its own: colours are resolved, since they come from the page's style. */
export function toSvg(picture: SVGSVGElement): string {
  const copy = picture.cloneNode(true) as SVGSVGElement;
  const style = getComputedStyle(picture);
  const box = picture.viewBox.baseVal;
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", String(box.width));
  copy.setAttribute("height", String(box.height));
  copy.setAttribute("color", style.color);
  copy.setAttribute("font-family", "sans-serif");
  copy.setAttribute("font-size", "13");
  return new XMLSerializer().serializeToString(copy)
    .replaceAll("var(--accent)", style.getPropertyValue("--accent"))
    .replaceAll("var(--paper)", style.getPropertyValue("--paper"));
}

/** Saves a picture as SVG or PNG (twice its size, on the page's background). */
export function savePicture(picture: SVGSVGElement, kind: "svg" | "png"): void {
  const text = toSvg(picture);
  if (kind === "svg") return download("logit-lens.svg", new Blob([text], { type: "image/svg+xml" }));
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
}
