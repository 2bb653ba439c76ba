// A table of cells on a canvas, iterations across: logit lens, changes of positions, loops of tokens.
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { download } from "./run";

/** How full a cell is, 0 to 1, and its text; `last`: the loop stopped here. */
export interface Cell { fill: number; text: string; last?: boolean }

export interface HeatMapData {
  label: string; rows: string[]; columns: number;
  /** null: there is no cell. */
  cell: (row: number, column: number) => Cell | null;
  cellWidth?: number;
}

const CELL = 44, ROW = 26, LABEL = 150, HEAD = 24;
/** Pixels of a picture at most: some browsers make no larger canvas. */
const MOST_PIXELS = 8e6;
const darkScheme = matchMedia("(prefers-color-scheme: dark)");

/** Whether text on a cell has more contrast in the colour of the paper than in that of the ink. */
export const isPaperText = (fill: number) => fill > (darkScheme.matches ? 0.52 : 0.7);

interface Colours { ink: string; paper: string; accent: string }

function readColours(element: Element): Colours {
  const style = getComputedStyle(element);
  return { ink: style.color, paper: style.getPropertyValue("--paper").trim(), accent: style.getPropertyValue("--accent").trim() };
}

/** What a map is drawn with: a canvas or the text of an SVG file. */
interface Brush {
  rect(x: number, y: number, width: number, height: number, colour: string, alpha: number): void;
  frame(x: number, y: number, width: number, height: number, colour: string): void;
  text(text: string, x: number, y: number, size: number, align: "middle" | "end", colour: string): void;
}

function sizeOf({ rows, columns, cellWidth = CELL }: HeatMapData) {
  return { width: LABEL + columns * cellWidth + 2, height: HEAD + rows.length * ROW + 4, cellWidth };
}

/** The part of a map that is drawn; its labels and numbers stay at the edges. */
interface View { x: number; y: number; width: number; height: number }

function paint(map: HeatMapData, brush: Brush, { ink, paper, accent }: Colours, view: View, selected = 0): void {
  const { cellWidth } = sizeOf(map), count = map.rows.length;
  const first = Math.max(0, Math.floor(view.x / cellWidth)), end = Math.min(map.columns, Math.ceil((view.x + view.width - LABEL) / cellWidth));
  const top = Math.max(0, Math.floor(view.y / ROW)), bottom = Math.min(count, Math.ceil((view.y + view.height - HEAD) / ROW));
  const left = (i: number) => LABEL + i * cellWidth - view.x, under = (row: number) => HEAD + row * ROW - view.y;
  for (let row = top; row < bottom; row++) {
    const y = under(row) + 1;
    for (let i = first; i < end; i++) {
      const cell = map.cell(row, i), x = left(i) + 1;
      if (!cell) continue;
      brush.rect(x, y, cellWidth - 2, ROW - 2, ink, 0.05);
      if (cell.fill > 0) brush.rect(x, y, cellWidth - 2, ROW - 2, accent, cell.fill);
      if (cell.last) brush.frame(x + 1, y + 1, cellWidth - 4, ROW - 4, ink);
      if (cell.text) brush.text(cell.text, x + cellWidth / 2 - 1, y + 16, 11, "middle", isPaperText(cell.fill) ? paper : ink);
    }
  }
  if (view.x > 0) brush.rect(0, 0, LABEL, view.height, paper, 1);
  for (let row = top; row < bottom; row++) brush.text(map.rows[row].slice(0, 20), LABEL - 10, under(row) + 17, 13, "end", ink);
  if (view.y > 0) brush.rect(0, 0, view.width, HEAD, paper, 1);
  for (let i = first; i < end; i++) if (left(i) >= LABEL - cellWidth / 2) brush.text(String(i + 1), left(i) + cellWidth / 2, 16, 13, "middle", ink);
  if (selected > 0 && selected <= map.columns && left(selected - 1) >= LABEL - 1) {
    brush.frame(left(selected - 1), 1, cellWidth, Math.min(view.height, under(count) + 2) - 2, ink);
  }
}

function canvasBrush(context: CanvasRenderingContext2D): Brush {
  let font = 0;
  return {
    rect(x, y, width, height, colour, alpha) {
      context.globalAlpha = alpha; context.fillStyle = colour;
      context.fillRect(x, y, width, height);
    },
    frame(x, y, width, height, colour) {
      context.globalAlpha = 1; context.strokeStyle = colour; context.lineWidth = 2;
      context.strokeRect(x, y, width, height);
    },
    text(text, x, y, size, align, colour) {
      if (font !== size) context.font = `${font = size}px system-ui, "DejaVu Sans", sans-serif`;
      context.globalAlpha = 1; context.fillStyle = colour; context.textAlign = align === "end" ? "right" : "center";
      context.fillText(text, x, y);
    },
  };
}

function draw(canvas: HTMLCanvasElement, map: HeatMapData, view: View, scale: number, colours: Colours, selected?: number): void {
  const width = Math.round(view.width * scale), height = Math.round(view.height * scale);
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const context = canvas.getContext("2d", { alpha: false })!;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.globalAlpha = 1; context.fillStyle = colours.paper;
  context.fillRect(0, 0, width, height);
  context.scale(scale, scale);
  paint(map, canvasBrush(context), colours, view, selected);
}

const escape = (text: string) => text.replace(/[&<>"]/g, (character) => `&#${character.charCodeAt(0)};`)
  // Characters that XML does not allow.
  .replace(/[^\t\n\r\u0020-\uD7FF\uE000-\uFFFD\u{10000}-\u{10FFFF}]/gu, "\uFFFD");

export function toSvg(map: HeatMapData, colours: Colours): string {
  const { width, height } = sizeOf(map), parts: string[] = [];
  paint(map, {
    rect: (x, y, w, h, colour, alpha) => parts.push(`<rect x="${x}" y="${y}" width="${w}" height="${h}" rx="3" fill="${colour}" fill-opacity="${alpha}"/>`),
    frame: (x, y, w, h, colour) => parts.push(`<rect x="${x}" y="${y}" width="${w}" height="${h}" rx="3" fill="none" stroke="${colour}" stroke-width="2"/>`),
    text: (text, x, y, size, align, colour) => parts.push(`<text x="${x}" y="${y}" font-size="${size}" text-anchor="${align}" fill="${colour}">${escape(text)}</text>`),
  }, colours, { x: 0, y: 0, width, height });
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="sans-serif">${parts.join("\n")}</svg>`;
}

/** Saves a map as SVG or PNG (twice its size, on the page's background). */
export function savePicture(map: HeatMapData, kind: "svg" | "png"): void {
  const colours = readColours(document.body);
  if (kind === "svg") return download("logit-lens.svg", new Blob([toSvg(map, colours)], { type: "image/svg+xml" }));
  const canvas = document.createElement("canvas"), { width, height } = sizeOf(map);
  draw(canvas, map, { x: 0, y: 0, width, height }, Math.min(2, Math.sqrt(MOST_PIXELS / (width * height))), colours);
  canvas.toBlob((blob) => blob && download("logit-lens.png", blob), "image/png");
}

interface HeatMapProps { map: HeatMapData; name: string; selected?: number; select?: (t: number) => void; caption?: string }

/** Draws only what its scrolled box shows, so that the size of a trace does not matter. */
export function HeatMap({ map, name, selected, select, caption = "iteration" }: HeatMapProps) {
  const box = useRef<HTMLDivElement>(null), canvas = useRef<HTMLCanvasElement>(null);
  const { width, height, cellWidth } = sizeOf(map);
  const redraw = useRef(() => {});
  redraw.current = () => {
    const { clientWidth, clientHeight, scrollLeft, scrollTop } = box.current!, element = canvas.current!;
    if (!clientWidth) return;
    const view = { x: scrollLeft, y: scrollTop, width: Math.min(clientWidth, width), height: Math.min(clientHeight, height) };
    element.style.width = `${view.width}px`; element.style.height = `${view.height}px`;
    draw(element, map, view, devicePixelRatio, readColours(element), selected);
  };
  useEffect(() => {
    let frame = 0;
    const later = () => { frame ||= requestAnimationFrame(() => { frame = 0; redraw.current(); }); };
    box.current!.addEventListener("scroll", later, { passive: true });
    darkScheme.addEventListener("change", later);
    return () => { darkScheme.removeEventListener("change", later); cancelAnimationFrame(frame); };
  }, []);
  useLayoutEffect(() => {
    // It calls back at once, after the layout that it needs.
    const observer = new ResizeObserver(() => redraw.current());
    observer.observe(box.current!);
    return () => observer.disconnect();
  }, [map]);
  useEffect(() => {
    if (!selected) return;
    const { clientWidth, scrollLeft } = box.current!, left = (selected - 1) * cellWidth;
    if (left < scrollLeft) box.current!.scrollLeft = left;
    else if (left + cellWidth + LABEL > scrollLeft + clientWidth) box.current!.scrollLeft = left + cellWidth + LABEL - clientWidth;
    redraw.current();
  }, [selected]);
  const choose = (event: MouseEvent) => {
    const t = Math.floor((event.offsetX - LABEL + box.current!.scrollLeft) / cellWidth) + 1;
    if (event.offsetX >= LABEL && t <= map.columns) select?.(t);
  };
  return (
    <>
      <div class="scroll tall map" tabIndex={0} role="group" aria-label={name} ref={box}>
        <div style={{ width: `${width}px`, height: `${height}px` }}>
          <canvas ref={canvas} role="img" aria-label={selected ? `${map.label}. Iteration ${selected} is marked.` : map.label} onClick={choose} />
        </div>
      </div>
      <MapTable map={map} caption={caption} />
    </>
  );
}

/** The same figures as a table, made when it is opened. */
function MapTable({ map, caption }: { map: HeatMapData; caption: string }) {
  const [isOpen, setIsOpen] = useState(false);
  const table = useMemo(() => isOpen && (
    <div class="scroll tall" tabIndex={0} role="group" aria-label={`${map.label}: table`}>
      <table>
        <caption>{map.label}</caption>
        <thead><tr><th scope="col">{caption}</th>{Array.from({ length: map.columns }, (_, i) => <th key={i} scope="col">{i + 1}</th>)}</tr></thead>
        <tbody>{map.rows.map((text, row) => (
          <tr key={row}><th scope="row">{text}</th>{Array.from({ length: map.columns }, (_, i) => {
            const cell = map.cell(row, i);
            return <td key={i}>{cell ? `${cell.text}${cell.last ? " (exit)" : ""}` : "–"}</td>;
          })}</tr>
        ))}</tbody>
      </table>
    </div>
  ), [isOpen, map]);
  return <details class="as-table" onToggle={(event) => setIsOpen(event.currentTarget.open)}><summary>As a table</summary>{table}</details>;
}
