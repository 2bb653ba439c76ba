// Reads Prometheus' text format.

export interface Snapshot { time: number; samples: Map<string, number> }

/** Samples by name, or `name{label="value",...}` as in the text. */
export function readMetrics(text: string): Map<string, number> {
  const samples = new Map<string, number>();
  for (const line of text.split("\n")) {
    const found = /^(\w+(?:\{.*\})?) (\S+)/.exec(line);
    if (found) samples.set(found[1], found[2] === "+Inf" ? Infinity : Number(found[2]));
  }
  return samples;
}

/** The samples of one metric by the value of one label. */
export function byLabel(samples: Map<string, number>, name: string, label: string): Map<string, number> {
  const found = new Map<string, number>();
  for (const [key, value] of samples) {
    if (!key.startsWith(`${name}{`)) continue;
    const of = new RegExp(`[{,]${label}="((?:[^"\\\\]|\\\\.)*)"`).exec(key)?.[1];
    if (of !== undefined) found.set(of, value);
  }
  return found;
}

/** Differences of two maps of counters. */
export function since(now: Map<string, number>, before: Map<string, number>): Map<string, number> {
  return new Map([...now].map(([key, value]) => [key, value - (before.get(key) ?? 0)]));
}

/** A quantile of a histogram from its cumulative buckets, linear inside a bucket; null if it is empty. */
export function quantile(buckets: Map<string, number>, q: number): number | null {
  const bounds = [...buckets].map(([bound, count]): [number, number] => [bound === "+Inf" ? Infinity : Number(bound), count])
    .sort(([a], [b]) => a - b);
  const total = bounds.at(-1)?.[1] ?? 0;
  if (!(total > 0)) return null;
  let [low, below] = [0, 0];
  for (const [bound, count] of bounds) {
    if (count >= q * total) return bound === Infinity ? low : low + ((bound - low) * (q * total - below)) / (count - below || 1);
    [low, below] = [bound, count];
  }
  return low;
}
