// The views of a run besides its charts: what its heat maps show, facts as a graph, path of the states.
import { Graph, layout } from "@dagrejs/dagre";
import { useMemo } from "preact/hooks";
import type { Iteration } from "./api";
import { type HeatMapData, isPaperText } from "./heatmap";
import type { Facts } from "./prosqa";
import type { Point, Projection } from "./states";

/** Most rows of the logit lens, and the probability that a token must reach to get one. */
const LENS_ROWS = 50, LENS_PROBABILITY = 0.01;
/** The colour of text on a shape that is filled with the accent. */
const textColour = (fill: number) => (isPaperText(fill) ? "var(--paper)" : "currentColor");

/** The likeliest tokens of a trace, in the order in which they lead. */
function lensRows(trace: Iteration[]): string[] {
  const best = new Map<string, { prob: number; t: number }>();
  for (const step of trace) for (const { token, prob } of step.top_tokens) {
    if (prob > (best.get(token)?.prob ?? 0)) best.set(token, { prob, t: step.t });
  }
  const rows = [...best].filter(([, { prob }]) => prob >= LENS_PROBABILITY).sort(([, a], [, b]) => b.prob - a.prob).slice(0, LENS_ROWS);
  return rows.sort(([, a], [, b]) => a.t - b.t || b.prob - a.prob).map(([token]) => token);
}

export const showToken = (token: string) => token.trim() || JSON.stringify(token);

/** The probability of each token after each iteration. */
export function lensMap(trace: Iteration[]): HeatMapData {
  const tokens = lensRows(trace), probs = trace.map((step) => new Map(step.top_tokens.map((top) => [top.token, top.prob])));
  return {
    label: "Logit lens: probability of each token after each iteration", rows: tokens.map(showToken), columns: trace.length,
    cell: (row, i) => {
      const prob = probs[i].get(tokens[row]) ?? 0;
      return { fill: prob, text: prob >= 0.005 ? prob.toFixed(2) : "" };
    },
  };
}

/** Changes that fill a cell completely, and not at all; logarithmic between them. */
const FULL = 2, EMPTY = 0.005;

/** The change of each position of a workspace; a full cell still moves, an empty one has settled. */
export function positionMap(changes: (number | null)[][]): HeatMapData {
  return {
    label: "Relative change of each position after each iteration", columns: changes.length,
    rows: Array.from({ length: Math.max(...changes.map((step) => step.length)) }, (_, i) => `position ${i + 1}`),
    cell: (row, i) => {
      const change = changes[i][row];
      if (change == null) return { fill: 0, text: "" };
      const fill = change > 0 ? Math.log(change / EMPTY) / Math.log(FULL / EMPTY) : 0;
      return { fill: Math.min(1, Math.max(0, fill)), text: change < 0.01 ? change.toExponential(0) : change.toPrecision(2) };
    },
  };
}

const TOKEN_CELL = 84, TOKEN_TEXT = 11, UNREAD = 0.3;

/** The written tokens down, the iterations of their loops across; a cell shows the likeliest token, filled by its probability. */
export function tokenMap(tokens: string[], iterations: number[], traces: Iteration[][]): HeatMapData {
  const columns = iterations.reduce((most, count) => Math.max(most, count), 1);
  return {
    label: "Loop of each token: the likeliest token after each iteration, until the exit", columns, cellWidth: TOKEN_CELL,
    rows: iterations.map((_, i) => (tokens[i] ? showToken(tokens[i]) : `token ${i + 1}`)),
    cell: (row, i) => {
      if (i >= iterations[row]) return null;
      const top = traces[row]?.[i]?.top_tokens[0], last = i + 1 === iterations[row];
      return top ? { fill: top.prob, text: showToken(top.token).slice(0, TOKEN_TEXT), last } : { fill: UNREAD, text: "", last };
    },
  };
}

const PATH_WIDTH = 380, PATH_HEIGHT = 300, MARGIN = 34;

export interface Path { label: string; points: Point[]; settled: boolean; dashed?: boolean }

/** Paths of states on their first two principal components. Both axes have the same scale. */
export function PathPicture({ paths, shares, selected }: { paths: Path[]; shares: Projection["shares"]; selected?: number }) {
  const all = paths.flatMap((path) => path.points);
  const [left, right] = [Math.min(...all.map(([x]) => x)), Math.max(...all.map(([x]) => x))];
  const [low, high] = [Math.min(...all.map(([, y]) => y)), Math.max(...all.map(([, y]) => y))];
  const scale = Math.min((PATH_WIDTH - 2 * MARGIN) / (right - left || 1), (PATH_HEIGHT - 2 * MARGIN) / (high - low || 1));
  const place = ([x, y]: Point): Point => [
    PATH_WIDTH / 2 + (x - (left + right) / 2) * scale, PATH_HEIGHT / 2 - (y - (low + high) / 2) * scale,
  ];
  const percent = (share: number) => `${Math.round(100 * share)} %`;
  return (
    <svg class="path" viewBox={`0 0 ${PATH_WIDTH} ${PATH_HEIGHT}`} role="img"
      aria-label={`Path of the state on two principal components, which show ${percent(shares[0] + shares[1])} of its variance`}>
      {paths.map(({ label, points, settled, dashed }) => {
        const placed = points.map(place), last = placed[placed.length - 1];
        const fill = dashed ? "var(--paper)" : "var(--accent)", stroke = dashed ? "currentColor" : "var(--accent)";
        return (
          <g key={label}>
            <polyline points={placed.map((point) => point.join(",")).join(" ")} fill="none" stroke={stroke} stroke-width={1.5}
              stroke-opacity={0.7} stroke-dasharray={dashed ? "6 4" : "none"} />
            {settled && last && <circle cx={last[0]} cy={last[1]} r={14} fill="none" stroke="currentColor" stroke-width={2} />}
            {placed.map(([x, y], i) => {
              const radius = selected === i + 1 ? 10 : 8;
              return (
                <g key={i}>
                  {dashed ? <rect x={x - radius} y={y - radius} width={2 * radius} height={2 * radius} fill={fill} stroke={stroke} />
                    : <circle cx={x} cy={y} r={radius} fill={fill} stroke={selected === i + 1 ? "currentColor" : fill} stroke-width={2} />}
                  <text x={x} y={y + 4} text-anchor="middle" font-size={10} fill={dashed ? "currentColor" : "var(--paper)"}>{i + 1}</text>
                </g>
              );
            })}
          </g>
        );
      })}
      <text x={PATH_WIDTH - 6} y={PATH_HEIGHT - 6} text-anchor="end" font-size={11} fill="currentColor">{percent(shares[0])} →</text>
      <text x={6} y={14} font-size={11} fill="currentColor">↑ {percent(shares[1])}</text>
    </svg>
  );
}

export function FactGraph({ facts, step }: { facts: Facts; step: Iteration | undefined }) {
  const placed = useMemo(() => {
    const graph = new Graph();
    graph.setGraph({ rankdir: "LR", nodesep: 8, ranksep: 34, marginx: 6, marginy: 6 });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const [from, to] of facts.edges) {
      for (const name of [from, to]) graph.setNode(name, { width: 84, height: 28 });
      graph.setEdge(from, to);
    }
    layout(graph);
    return graph;
  }, [facts]);
  const probs = new Map<string, number>();
  for (const { token, prob } of step?.top_tokens ?? []) {
    const word = /(\w+)\W*$/.exec(token)?.[1];
    if (word) probs.set(word, (probs.get(word) ?? 0) + prob);
  }
  const { width = 100, height = 100 } = placed.graph() as { width?: number; height?: number };
  return (
    <svg class="graph" viewBox={`0 0 ${width} ${height}`} role="img"
      aria-label={`Facts as a graph. Most likely now: ${[...probs].slice(0, 3).map(([name, p]) => `${name} ${p.toFixed(2)}`).join(", ")}`}>
      {placed.edges().map((edge) => (
        <polyline key={`${edge.v} ${edge.w}`} fill="none" stroke="currentColor" stroke-opacity={0.3}
          points={placed.edge(edge).points.map((p: { x: number; y: number }) => `${p.x},${p.y}`).join(" ")} />
      ))}
      {placed.nodes().map((name) => {
        const { x, y } = placed.node(name), prob = Math.min(1, probs.get(name) ?? 0);
        const marked = name === facts.root || facts.options.includes(name);
        return (
          <g key={name}>
            <rect x={x - 42} y={y - 14} width={84} height={28} rx={14} fill="var(--paper)" />
            <rect x={x - 42} y={y - 14} width={84} height={28} rx={14} fill="var(--accent)" fill-opacity={prob}
              stroke="currentColor" stroke-width={marked ? 2.5 : 1} stroke-dasharray={facts.options.includes(name) ? "5 3" : "none"}
              stroke-opacity={marked ? 1 : 0.4} />
            <text x={x} y={y + 4} text-anchor="middle" font-size={12} fill={textColour(prob)}>{name}</text>
          </g>
        );
      })}
    </svg>
  );
}
