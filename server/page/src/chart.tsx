// A line chart over iterations or time, drawn by uPlot.
import { useEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";

export interface Series { label: string; values: (number | null)[]; dashed?: boolean }

const HEIGHT = 150;
/** Iterations (or seconds) between grid lines. */
const STEPS = [1, 2, 5, 10, 20, 30, 60];
/** Values that are drawn with a point each. */
const MOST_POINTS = 70;

interface ChartProps {
  title: string; note: string; series: Series[];
  /** Default: 1, 2, 3, ... */
  x?: number[];
  /** Index (from 0) of the marked point. */
  selected?: number;
  log?: boolean;
  /** Height of a dotted horizontal line. */
  guide?: number | null;
}

const format = (value: number | null | undefined) => (value == null ? "–" : String(+value.toPrecision(3)));

export function Chart({ title, note, series, x, selected, log, guide }: ChartProps) {
  const host = useRef<HTMLDivElement>(null), drawn = useRef<uPlot | null>(null), marked = useRef(selected);
  marked.current = selected;
  const length = Math.max(...series.map(({ values }) => values.length));
  const [near, setNear] = useState(false);
  // Charts are costly to draw: one that is far from the window is drawn when it comes near.
  useEffect(() => {
    const observer = new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) setNear(true); },
      { rootMargin: "300px" });
    observer.observe(host.current!);
    return () => observer.disconnect();
  }, []);
  useEffect(() => {
    if (!near) return;
    const element = host.current!, style = getComputedStyle(element);
    const ink = style.color, accent = style.getPropertyValue("--accent"), rule = style.getPropertyValue("--rule");
    const xs = x ?? Array.from({ length }, (_, i) => i + 1);
    const shown = series.map(({ values }) => xs.map((_, i) => values[i] ?? null).map((v) => (log && v !== null && v <= 0 ? null : v)));
    const axis = { stroke: ink, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule, width: 1 } };
    const given = [...shown.flat().filter((v): v is number => v !== null), ...(guide && guide > 0 ? [guide] : [])];
    const low = Math.min(...given), high = Math.max(...given);
    const range: uPlot.Range.MinMax = !given.length ? [log ? 0.01 : 0, 1]
      : log ? [low / 1.6, high * 1.6] : [Math.min(0, low), high > 0 ? high * 1.1 : 1];
    const points = xs.length < MOST_POINTS;
    const chart = new uPlot({
      width: element.clientWidth || 280, height: HEIGHT, legend: { show: false }, cursor: { show: false },
      scales: {
        x: { time: false, range: [(xs[0] ?? 1) - 0.5, Math.max(xs.at(-1) ?? 1, (xs[0] ?? 1) + 1) + 0.5] },
        y: { distr: log ? 3 : 1, range },
      },
      axes: [
        { ...axis, size: 28, incrs: STEPS },
        { ...axis, size: 48, values: (_, ticks) => ticks.map((v) => (v === null ? "" : String(+v.toPrecision(2)))) },
      ],
      series: [
        {},
        ...series.map(({ dashed }): uPlot.Series => dashed
          ? { stroke: ink, width: 2, dash: [6, 4], points: { show: points, size: 7, stroke: ink, fill: style.getPropertyValue("--paper") } }
          : { stroke: accent, width: 2, points: { show: points, size: 7, fill: accent } }),
        { stroke: ink, width: 1.5, dash: [2, 4], points: { show: false } },
      ],
      hooks: {
        draw: [({ ctx, bbox, valToPos }) => {
          if (marked.current === undefined || marked.current < 0) return;
          const left = valToPos(xs[marked.current], "x", true);
          ctx.save(); ctx.globalAlpha = 0.14; ctx.fillStyle = ink;
          ctx.fillRect(left - 8, bbox.top, 16, bbox.height); ctx.restore();
        }],
      },
    }, [xs, ...shown, xs.map(() => guide ?? null)], element);
    drawn.current = chart;
    const observer = new ResizeObserver(() => chart.setSize({ width: element.clientWidth, height: HEIGHT }));
    observer.observe(element);
    return () => { observer.disconnect(); chart.destroy(); };
  }, [near, series, x, log, guide]);
  useEffect(() => { drawn.current?.redraw(false, false); }, [selected]);
  const at = (values: (number | null)[]) => format(values[selected ?? values.length - 1]);
  const text = series.map(({ label, values }) => `${label} ${values.map(format).join(", ")}`).join("; ");
  return (
    <figure class="chart">
      <figcaption><b>{title}</b> <output>{series.map(({ values }) => at(values)).join(" | ")}</output><small>{note}</small></figcaption>
      <div ref={host} role="img" aria-label={`${title}: ${text}`} />
    </figure>
  );
}
