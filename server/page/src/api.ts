// The server's API: types of its answers, and the reader of its event streams.

export interface TopToken { token: string; prob: number }
export interface Iteration {
  t: number; relative_change: number | null; cosine: number | null; norm: number | null; contraction: number | null;
  kl: number | null; entropy: number | null; adapter: string | null; duration_s: number; top_tokens: TopToken[];
  thought?: string;
  /** With include_states: h_t, a list of numbers for each workspace position. */
  state?: (number | null)[][];
}
export interface Result {
  text: string; iterations: number; exit_reason: string; final_change: number | null; budget_reduced: boolean;
  usage: { prompt_tokens: number; completion_tokens: number; forward_passes: number };
  timings: { total_s: number };
  /** In the workspace `token`: the iterations of each token's loop. */
  iterations_per_token?: number[];
  /** With trace_tokens: the loops before the first tokens. */
  token_traces?: Iteration[][];
}
export interface TraceResult extends Result { trace: Iteration[] }
export interface Message { role: "system" | "user" | "assistant"; content: string }
export interface Settings {
  max_iterations?: number; convergence?: { criterion?: string; threshold?: number };
  initial_noise?: { scale: number };
  temperature?: number; loop_set?: string; max_new_tokens?: number;
}
export interface Checkpoint {
  model: string; models: string[]; trained: boolean; chat: boolean; tasks: string[]; workspace: string; positions: number | null; hidden_size: number;
  trained_iterations: number; max_iterations: number; criterion: string; threshold: number;
  criteria: Record<string, number>; max_new_tokens: number;
  limits: { max_iterations: number; max_top_tokens: number; max_new_tokens: number; max_prompts: number; max_state_values: number };
  examples: { prompt: string; answer: string | null }[];
}

export class ServerError extends Error {
  /** `status` is 0 if there was no answer; `param` is the field at fault, if the server names one. */
  constructor(message: string, readonly status: number, readonly param: string | null = null) { super(message); }
}

async function request(path: string, key: string, init: RequestInit = {}, accept = "application/json"): Promise<Response> {
  const headers: Record<string, string> = { accept };
  if (init.body) headers["content-type"] = "application/json";
  if (key) headers["authorization"] = `Bearer ${key}`;
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new ServerError("The server cannot be reached.", 0);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    const message = body?.error?.message ?? `The server answered with status ${response.status}.`;
    throw new ServerError(message, response.status, body?.error?.param ?? null);
  }
  return response;
}

export async function getCheckpoint(key: string): Promise<Checkpoint> {
  return (await request("checkpoint", key)).json();
}

/** The metrics in Prometheus' text format. */
export async function getMetrics(key: string): Promise<string> {
  return (await request("metrics", key, {}, "text/plain")).text();
}

const RETRIES = 20;

/** Sends a request that is answered at once; while the server's queue is full, waits and tries again. */
export async function post<T>(path: "generate" | "trace" | "grade", body: object, key: string, signal: AbortSignal): Promise<T> {
  for (let tries = 0; ; tries++) {
    try {
      const response = await request(path, key, { method: "POST", body: JSON.stringify(body), signal });
      return await response.json();
    } catch (error) {
      if (!(error instanceof ServerError && error.status === 429) || tries === RETRIES) throw error;
      await new Promise((resolve) => setTimeout(resolve, 500));
      signal.throwIfAborted();
    }
  }
}

/** Sends a request to /trace and calls `on` with the name and data of every event. */
export async function stream(
  body: object, key: string, signal: AbortSignal, on: (name: string, data: any) => void,
): Promise<void> {
  const response = await request("trace", key, { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      text += value;
      const frames = text.split("\n\n");
      text = frames.pop()!;
      for (const frame of frames) {
        const name = /^event: (.*)$/m.exec(frame)?.[1];
        const data = /^data: (.*)$/m.exec(frame)?.[1];
        if (!name || data === undefined) continue;
        const parsed = JSON.parse(data);
        if (name === "error") throw new ServerError(parsed.error.message, 500);
        on(name, parsed);
        if (name === "done") return;
      }
    }
  } catch (error) {
    if (error instanceof ServerError || signal.aborted) throw error;
  }
  throw new ServerError("The connection ended before the answer was complete.", 0);
}
