// The views of a run: charts over iterations, logit lens, graph of a ProsQA question.
import { Graph, layout } from "@dagrejs/dagre";
import { useEffect, useMemo, useRef } from "preact/hooks";
import uPlot from "uplot";
import type { Iteration } from "./api";

const LENS_ROWS = 12;
/** Probability from which a cell is filled so strongly that its text takes the colour of the paper. */
const DARK = 0.7;
const CELL = 44, ROW = 26, LABEL = 150, HEAD = 24;

export interface ChartProps {
  title: string; note: string; trace: Iteration[]; selected: number; log?: boolean; threshold?: number | null;
  value: (step: Iteration) => number | null;
}

export function Chart({ title, note, trace, selected, log, threshold, value }: ChartProps) {
  const host = useRef<HTMLDivElement>(null);
  const values = trace.map(value);
  useEffect(() => {
    const element = host.current!;
    const style = getComputedStyle(element);
    const ink = style.color, accent = style.getPropertyValue("--accent"), rule = style.getPropertyValue("--rule");
    const shown = log ? values.map((v) => (v !== null && v > 0 ? v : null)) : values;
    const axis = { stroke: ink, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule, width: 1 } };
    const given = shown.filter((v): v is number => v !== null);
    const line = threshold && threshold > 0 ? [threshold] : [];
    const low = Math.min(...given, ...line), high = Math.max(...given, ...line);
    const range: uPlot.Range.MinMax = !given.length ? [log ? 0.01 : 0, 1]
      : log ? [low / 1.6, high * 1.6] : [Math.min(0, low), high > 0 ? high * 1.1 : 1];
    const chart = new uPlot({
      width: element.clientWidth || 280, height: 150, legend: { show: false }, cursor: { show: false },
      scales: { x: { time: false, range: [0.5, Math.max(trace.length, 2) + 0.5] }, y: { distr: log ? 3 : 1, range } },
      axes: [
        { ...axis, size: 28, incrs: [1, 2, 5, 10, 20] },
        { ...axis, size: 48, values: (_, ticks) => ticks.map((v) => (v === null ? "" : String(+v.toPrecision(2)))) },
      ],
      series: [
        {},
        { stroke: accent, width: 2, points: { show: true, size: 7, fill: accent } },
        { stroke: ink, width: 1.5, dash: [5, 4], points: { show: false } },
      ],
      hooks: {
        draw: [({ ctx, bbox, valToPos }) => {
          const x = valToPos(selected, "x", true);
          ctx.save(); ctx.globalAlpha = 0.14; ctx.fillStyle = ink;
          ctx.fillRect(x - 8, bbox.top, 16, bbox.height); ctx.restore();
        }],
      },
    }, [trace.map((step) => step.t), shown, trace.map(() => threshold ?? null)], element);
    const observer = new ResizeObserver(() => chart.setSize({ width: element.clientWidth, height: 150 }));
    observer.observe(element);
    return () => { observer.disconnect(); chart.destroy(); };
  }, [trace, selected, log, threshold]);
  const current = values[selected - 1];
  return (
    <figure class="chart">
      <figcaption><b>{title}</b> <output>{current == null ? "–" : current.toPrecision(3)}</output><small>{note}</small></figcaption>
      <div ref={host} role="img" aria-label={`${title} per iteration: ${values.map((v) => v?.toPrecision(3) ?? "none").join(", ")}`} />
    </figure>
  );
}

/** The likeliest tokens of a trace, in the order in which they lead. */
function lensRows(trace: Iteration[]): string[] {
  const best = new Map<string, { prob: number; t: number }>();
  for (const step of trace) for (const { token, prob } of step.top_tokens) {
    if (prob > (best.get(token)?.prob ?? 0)) best.set(token, { prob, t: step.t });
  }
  const rows = [...best].sort(([, a], [, b]) => b.prob - a.prob).slice(0, LENS_ROWS);
  return rows.sort(([, a], [, b]) => a.t - b.t || b.prob - a.prob).map(([token]) => token);
}

const show = (token: string) => token.trim() || JSON.stringify(token);

export function Lens({ trace, selected, select }: { trace: Iteration[]; selected: number; select: (t: number) => void }) {
  const rows = useMemo(() => lensRows(trace), [trace]);
  const width = LABEL + trace.length * CELL, height = HEAD + rows.length * ROW + 4;
  return (
    <svg class="lens" data-picture="lens" viewBox={`0 0 ${width} ${height}`} width={width} height={height} role="img"
      aria-label="Logit lens: probability of each token after each iteration">
      {trace.map((step, i) => (
        <text key={i} x={LABEL + i * CELL + CELL / 2} y={16} text-anchor="middle" fill="currentColor"
          font-weight={step.t === selected ? "bold" : "normal"}>{step.t}</text>
      ))}
      {rows.map((token, row) => (
        <text key={token} x={LABEL - 10} y={HEAD + row * ROW + 17} text-anchor="end" fill="currentColor">{show(token).slice(0, 20)}</text>
      ))}
      {trace.map((step, i) => {
        const probs = new Map(step.top_tokens.map((top) => [top.token, top.prob]));
        return rows.map((token, row) => {
          const prob = probs.get(token) ?? 0, x = LABEL + i * CELL, y = HEAD + row * ROW;
          return (
            <g key={`${i} ${row}`} onClick={() => select(step.t)}>
              <rect x={x + 1} y={y + 1} width={CELL - 2} height={ROW - 2} rx={3} fill="currentColor" fill-opacity={0.05} />
              <rect x={x + 1} y={y + 1} width={CELL - 2} height={ROW - 2} rx={3} fill="var(--accent)" fill-opacity={prob} />
              {prob >= 0.005 && <text x={x + CELL / 2} y={y + 17} text-anchor="middle" font-size={11}
                fill={prob > DARK ? "var(--paper)" : "currentColor"}>{prob.toFixed(2)}</text>}
            </g>
          );
        });
      })}
      {trace.length > 0 && <rect x={LABEL + (selected - 1) * CELL} y={1} width={CELL} height={height - 2} rx={4} fill="none" stroke="currentColor" />}
    </svg>
  );
}

export interface Facts { edges: [string, string][]; root: string; options: string[] }

/** The graph of a ProsQA question; null if the prompt is not one. */
export function readFacts(prompt: string): Facts | null {
  const question = /Is (\w+) an? (\w+) or (?:an? )?(\w+)\?\s*$/.exec(prompt);
  if (!question) return null;
  const edges = [...prompt.matchAll(/(?:Every )?(\w+) is an? (\w+)\./g)].map((m): [string, string] => [m[1], m[2]]);
  return edges.length && edges.length <= 300 ? { edges, root: question[1], options: [question[2], question[3]] } : null;
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
            <text x={x} y={y + 4} text-anchor="middle" font-size={12} fill={prob > DARK ? "var(--paper)" : "currentColor"}>{name}</text>
          </g>
        );
      })}
    </svg>
  );
}
