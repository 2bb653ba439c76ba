// A run: what was asked and what came back; its forms outside the page.
import type { Iteration, Result, Settings } from "./api";

export interface Run {
  prompt: string; settings: Settings; model: string; criterion: string; threshold: number;
  trace: Iteration[]; text: string; result: Result | null;
}

const FORMAT = "slr-trace";

export const EXITS: Record<string, string> = {
  converged: "The state stopped changing, so the loop stopped.",
  max_iterations: "The loop used its maximum of iterations before the state stopped changing.",
  diverged: "The state grew instead of settling. The answer comes from the last good state.",
};

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

/** A link with the prompt and settings in the fragment, which browsers do not send. */
export function toLink(run: Run): string {
  const fragment = encodeURIComponent(JSON.stringify({ prompt: run.prompt, settings: run.settings }));
  return `${location.href.split("#")[0]}#${fragment}`;
}

export function readLink(): { prompt: string; settings: Settings } | null {
  try {
    const { prompt, settings } = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    return typeof prompt === "string" ? { prompt, settings: settings ?? {} } : null;
  } catch {
    return null;
  }
}

export const toFile = (run: Run) => JSON.stringify({ format: FORMAT, ...run }, null, 1);

const asNumber = (value: unknown) => (typeof value === "number" && Number.isFinite(value) ? value : null);

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
    top_tokens: (Array.isArray(step?.top_tokens) ? step.top_tokens : []).map((top: any) => (
      { token: String(top?.token), prob: asNumber(top?.prob) ?? 0 })),
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
  };
  return {
    prompt: String(file.prompt), settings: {}, model: String(file.model), criterion: String(file.criterion),
    threshold: asNumber(file.threshold) ?? 0, trace, text: String(file.text ?? ""), result: result ?? null,
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
