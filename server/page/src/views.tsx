// The views of a run besides its charts: logit lens, facts as a graph, path of the states, change of each position.
import { Graph, layout } from "@dagrejs/dagre";
import { useMemo } from "preact/hooks";
import type { Iteration } from "./api";
import type { Facts } from "./prosqa";
import type { Point, Projection } from "./states";

/** Most rows of the logit lens, and the probability that a token must reach to get one. */
const LENS_ROWS = 12, LENS_PROBABILITY = 0.01;
const darkScheme = matchMedia("(prefers-color-scheme: dark)");
/** The colour of text on a cell that is filled with the accent: ink or paper, whichever has more contrast. */
const textColour = (fill: number) => (fill > (darkScheme.matches ? 0.52 : 0.7) ? "var(--paper)" : "currentColor");
const CELL = 44, ROW = 26, LABEL = 150, HEAD = 24;

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

interface HeatMapProps {
  name: string; label: string; rows: string[]; columns: number; selected: number; select: (t: number) => void;
  /** How full a cell is, 0 to 1, and its text; the same function until the trace changes. */
  cell: (row: number, column: number) => { fill: number; text: string };
}

/** A table of cells, iterations across. */
function HeatMap({ name, label, rows, columns, selected, select, cell }: HeatMapProps) {
  const width = LABEL + columns * CELL + 2, height = HEAD + rows.length * ROW + 4;
  const numbers = Array.from({ length: columns }, (_, i) => i);
  const place = (i: number, row: number) => ({ x: LABEL + i * CELL + 1, y: HEAD + row * ROW + 1 });
  // The cells do not depend on the selection, so that scrubbing does not draw them again.
  const cells = useMemo(() => [
    <path key="empty" fill="currentColor" fill-opacity={0.05} d={numbers.map((i) => rows.map((_, row) => {
      const { x, y } = place(i, row);
      return `M${x} ${y}h${CELL - 2}v${ROW - 2}h${2 - CELL}z`;
    }).join("")).join("")} />,
    ...numbers.flatMap((i) => rows.flatMap((_, row) => {
      const { fill, text } = cell(row, i), { x, y } = place(i, row);
      return [
        fill > 0 && <rect key={`${i} ${row}`} x={x} y={y} width={CELL - 2} height={ROW - 2} rx={3} fill="var(--accent)" fill-opacity={fill} />,
        text && <text key={`${i} ${row} text`} x={x + CELL / 2 - 1} y={y + 16} text-anchor="middle" font-size={11}
          fill={textColour(fill)}>{text}</text>,
      ];
    })),
  ], [rows, columns, cell]);
  const choose = (event: MouseEvent) => {
    const t = Math.floor((event.offsetX - LABEL) / CELL) + 1;
    if (t >= 1 && t <= columns) select(t);
  };
  return (
    <svg class="lens" data-picture={name} viewBox={`0 0 ${width} ${height}`} width={width} height={height} role="img" aria-label={label}
      onClick={choose}>
      {numbers.map((i) => (
        <text key={i} x={LABEL + i * CELL + CELL / 2} y={16} text-anchor="middle" fill="currentColor"
          font-weight={i + 1 === selected ? "bold" : "normal"}>{i + 1}</text>
      ))}
      {rows.map((text, row) => (
        <text key={row} x={LABEL - 10} y={HEAD + row * ROW + 17} text-anchor="end" fill="currentColor">{text.slice(0, 20)}</text>
      ))}
      {cells}
      {columns > 0 && <rect x={LABEL + (selected - 1) * CELL} y={1} width={CELL} height={height - 2} rx={4} fill="none" stroke="currentColor" />}
    </svg>
  );
}

interface TraceProps { trace: Iteration[]; selected: number; select: (t: number) => void }

export function Lens({ trace, selected, select }: TraceProps) {
  const { rows, cell } = useMemo(() => {
    const tokens = lensRows(trace), probs = trace.map((step) => new Map(step.top_tokens.map((top) => [top.token, top.prob])));
    return {
      rows: tokens.map(showToken),
      cell: (row: number, i: number) => {
        const prob = probs[i].get(tokens[row]) ?? 0;
        return { fill: prob, text: prob >= 0.005 ? prob.toFixed(2) : "" };
      },
    };
  }, [trace]);
  return <HeatMap name="lens" label="Logit lens: probability of each token after each iteration" rows={rows}
    columns={trace.length} selected={selected} select={select} cell={cell} />;
}

/** Changes that fill a cell completely, and not at all; logarithmic between them. */
const FULL = 2, EMPTY = 0.005;

/** The change of each position of a workspace; a full cell still moves, an empty one has settled. */
export function Positions({ changes, selected, select }: { changes: (number | null)[][] } & Omit<TraceProps, "trace">) {
  const { rows, cell } = useMemo(() => ({
    rows: Array.from({ length: Math.max(...changes.map((step) => step.length)) }, (_, i) => `position ${i + 1}`),
    cell: (row: number, i: number) => {
      const change = changes[i][row];
      if (change == null) return { fill: 0, text: "" };
      const fill = change > 0 ? Math.log(change / EMPTY) / Math.log(FULL / EMPTY) : 0;
      return { fill: Math.min(1, Math.max(0, fill)), text: change < 0.01 ? change.toExponential(0) : change.toPrecision(2) };
    },
  }), [changes]);
  return <HeatMap name="positions" label="Relative change of each position after each iteration" columns={changes.length}
    rows={rows} selected={selected} select={select} cell={cell} />;
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

const MOST_TOKENS = 200, BAR_UNIT = 30, BAR_ROW = 22;

/** The written tokens down, the iterations of their loops across. */
export function TokenLoops({ tokens, iterations }: { tokens: string[]; iterations: number[] }) {
  const label = (i: number) => (i < tokens.length ? showToken(tokens[i]) : `token ${i + 1}`);
  const shown = iterations.slice(0, MOST_TOKENS), most = Math.max(1, ...shown);
  const width = LABEL + most * BAR_UNIT + 40, height = shown.length * BAR_ROW + 4;
  return (
    <>
      <svg class="tokens" viewBox={`0 0 ${width} ${height}`} width={width} height={height} role="img"
        aria-label={`Iterations of each token: ${shown.map((count, i) => `${label(i)} ${count}`).join(", ")}`}>
        {shown.map((count, i) => (
          <g key={i}>
            <text x={LABEL - 10} y={i * BAR_ROW + 16} text-anchor="end" fill="currentColor">{label(i).slice(0, 20)}</text>
            <rect x={LABEL} y={i * BAR_ROW + 3} width={count * BAR_UNIT} height={BAR_ROW - 5} rx={3} fill="var(--accent)" />
            <text x={LABEL + count * BAR_UNIT + 8} y={i * BAR_ROW + 16} fill="currentColor">{count}</text>
          </g>
        ))}
      </svg>
      {iterations.length > MOST_TOKENS && <p>{iterations.length - MOST_TOKENS} more tokens.</p>}
    </>
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
    <svg class="graph" data-picture="graph" viewBox={`0 0 ${width} ${height}`} role="img"
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
