"""The drawings of method.md. `python docs/drawings.py` writes append.svg, block.svg and prompt.svg beside this file.

Columns are positions and rows are forward passes, from top to bottom. A filled box is computed in that pass, a dashed
box is read from the cache, and an arrow leads from a state to the input that is made of it.
"""

from __future__ import annotations

from pathlib import Path

BOX, GAP, ROW, LEFT, TOP = 34, 8, 62, 214, 54
STYLE = """
text { font: 13px ui-sans-serif, system-ui, sans-serif; fill: #1f2328 }
.small { font-size: 11px; fill: #59636e } .in { fill: #ffffff; font-weight: 600 } .mid { text-anchor: middle }
.cached { fill: none; stroke: #8c959f; stroke-dasharray: 3 3 }
.base { fill: #57606a } .loop { fill: #8250df } .decode { fill: #1a7f37 } .vector { fill: none; stroke: #8250df }
.arrow { fill: none; stroke: #bc4c00; stroke-width: 1.6 } .head { fill: #bc4c00 }
.out { fill: #bc4c00; font-weight: 600 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .in { fill: #ffffff } .cached { stroke: #656c76 }
  .base { fill: #656c76 } .arrow { stroke: #f0883e } .head, .out { fill: #f0883e }
}
"""


class Drawing:
    """Boxes on a grid of positions and passes."""

    def __init__(self, columns: list[str], rows: list[tuple[str, str]]) -> None:
        self.width = LEFT + len(columns) * (BOX + GAP) + 96
        self.height = TOP + len(rows) * ROW + 4
        self.parts = [
            f'<text class="mid small" x="{self.x(i) + BOX / 2}" y="24">{name}</text>' for i, name in enumerate(columns)
        ]
        self.parts.append('<text class="small" x="8" y="24">position</text>')
        for j, (title, detail) in enumerate(rows):
            self.parts.append(f'<text x="8" y="{self.y(j) + 15}">{title}</text>')
            self.parts.append(f'<text class="small" x="8" y="{self.y(j) + 31}">{detail}</text>')

    def x(self, column: int) -> float:
        """Left edge of a column."""
        return LEFT + column * (BOX + GAP)

    def y(self, row: int) -> float:
        """Upper edge of a row's boxes."""
        return TOP + row * ROW

    def boxes(self, row: int, kind: str, columns: range, text: str = "") -> None:
        """Add boxes of one kind to a pass, with ``text`` in each."""
        for column in columns:
            self.parts.append(
                f'<rect class="{kind}" x="{self.x(column)}" y="{self.y(row)}" width="{BOX}" height="{BOX}" rx="5"/>'
            )
            if text:
                middle, base = self.x(column) + BOX / 2, self.y(row) + 22
                style = "mid" if kind in ("cached", "vector") else "mid in"
                self.parts.append(f'<text class="{style}" x="{middle}" y="{base}">{text}</text>')

    def arrow(self, row: int, start: int, end: int, label: str = "") -> None:
        """Add an arrow from a box to one in the next pass."""
        x1, y1 = self.x(start) + BOX / 2, self.y(row) + BOX
        x2, y2 = self.x(end) + BOX / 2, self.y(row + 1) - 6
        middle = (y1 + y2) / 2
        self.parts.append(f'<path class="arrow" d="M{x1} {y1} C{x1} {middle + 6} {x2} {middle - 6} {x2} {y2}"/>')
        self.parts.append(f'<path class="head" d="M{x2 - 4} {y2 - 1} h8 l-4 6 z"/>')
        if label:
            self.parts.append(f'<text class="small" x="{x2 + 9}" y="{middle + 6}">{label}</text>')

    def label(self, row: int, column: int, text: str) -> None:
        """Add a label to the right of a box: the token that the LM head reads there."""
        self.parts.append(f'<text class="out" x="{self.x(column) + BOX + 8}" y="{self.y(row) + 22}">{text}</text>')

    def save(self, name: str, title: str) -> None:
        """Write the drawing to a file beside this one."""
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{title}</title>\n'
        body = "\n".join(self.parts)
        Path(__file__).with_name(name).write_text(f"{head}<style>{STYLE}</style>\n{body}\n</svg>\n", encoding="utf-8")


def draw_append() -> None:
    """Draw the workspace `append`: each iteration adds a position."""
    rows = [
        ("prompt", "base model"),
        ("iteration 1", "adapter L₁, embedding e₁"),
        ("iteration 2", "adapter L₂, embedding e₂"),
        ("iteration 3: converged", "adapter L₃, embedding e₃"),
        ("first answer token", "adapter decode, if there is one"),
    ]
    drawing = Drawing(["1", "2", "…", "P", "P+1", "P+2", "P+3", "P+4"], rows)
    drawing.boxes(0, "base", range(4), "h")
    for t in (1, 2, 3):
        drawing.boxes(t, "cached", range(3 + t))
        drawing.boxes(t, "loop", range(3 + t, 4 + t), f"h{'₁₂₃'[t - 1]}")
        drawing.arrow(t - 1, 2 + t, 3 + t, f"u{'₁₂₃'[t - 1]}")
    drawing.label(3, 6, "→ token 1")
    drawing.boxes(4, "cached", range(7))
    drawing.boxes(4, "decode", range(7, 8), "a₁")
    drawing.label(4, 7, "→ token 2")
    drawing.save("append.svg", "append: each iteration adds one position and attends to the earlier ones")


def draw_block() -> None:
    """Draw the workspace `block`: each iteration runs the same K positions."""
    rows = [
        ("prompt", "base model"),
        ("iteration 1", "adapter L₁, embedding e₁"),
        ("iteration 2: converged", "adapter L₂, embedding e₂"),
        ("closing pass", "adapter decode, if there is one"),
        ("first answer token", "adapter decode, if there is one"),
    ]
    drawing = Drawing(["1", "2", "…", "P", "P+1", "P+2", "P+3", "P+4"], rows)
    drawing.boxes(0, "base", range(4), "h")
    drawing.boxes(0, "vector", range(4, 7), "h₀")
    for t in (1, 2):
        drawing.boxes(t, "cached", range(4))
        drawing.boxes(t, "loop", range(4, 7), f"h{'₁₂'[t - 1]}")
        for column in range(4, 7):
            drawing.arrow(t - 1, column, column, f"u{'₁₂'[t - 1]}" if column == 6 else "")
    drawing.boxes(3, "cached", range(4))
    drawing.boxes(3, "decode", range(4, 7))
    for column in range(4, 7):
        drawing.arrow(2, column, column, "project(h₂)" if column == 6 else "")
    drawing.label(3, 6, "→ token 1")
    drawing.boxes(4, "cached", range(7))
    drawing.boxes(4, "decode", range(7, 8), "a₁")
    drawing.label(4, 7, "→ token 2")
    drawing.save("block.svg", "block: K latent positions after the prompt, refined in place and in parallel")


def draw_prompt() -> None:
    """Draw the workspace `prompt`: each iteration runs the positions of the prompt."""
    rows = [
        ("input embeddings", "no pass"),
        ("iteration 1", "adapter L₁, embedding e₁"),
        ("iteration 2: converged", "adapter L₂, embedding e₂"),
        ("closing pass", "adapter decode, if there is one"),
        ("first answer token", "adapter decode, if there is one"),
    ]
    drawing = Drawing(["1", "2", "…", "P", "P+1"], rows)
    drawing.boxes(0, "vector", range(4), "h₀")
    for t in (1, 2):
        drawing.boxes(t, "loop", range(4), f"h{'₁₂'[t - 1]}")
        for column in range(4):
            drawing.arrow(t - 1, column, column, f"u{'₁₂'[t - 1]}" if column == 3 else "")
    drawing.boxes(3, "decode", range(4))
    for column in range(4):
        drawing.arrow(2, column, column, "project(h₂)" if column == 3 else "")
    drawing.label(3, 3, "→ token 1")
    drawing.boxes(4, "cached", range(4))
    drawing.boxes(4, "decode", range(4, 5), "a₁")
    drawing.label(4, 4, "→ token 2")
    drawing.save("prompt.svg", "prompt: the prompt's own positions, refined in place")


if __name__ == "__main__":
    draw_append()
    draw_block()
    draw_prompt()
