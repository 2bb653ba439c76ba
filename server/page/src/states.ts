// What is computed from the states of a trace: distances, principal components, the change of each position.

/** h_t: a list of numbers for each workspace position. */
export type State = number[][];
export type Point = [number, number];

/** The states of a trace; null if an iteration has none, or one that is not finite. */
export function readStates(trace: { state?: (number | null)[][] }[]): State[] | null {
  const finite = (state: (number | null)[][] | undefined): state is State => !!state?.every((row) => row.every((x) => x !== null));
  const states = trace.map((step) => step.state);
  return states.length && states.every(finite) ? states as State[] : null;
}

function squaredDistance(a: number[], b: number[]): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += (a[i] - b[i]) ** 2;
  return sum;
}

const squaredNorm = (a: number[]) => a.reduce((sum, x) => sum + x * x, 0);

/** ‖a − b‖ / ‖b‖ of every position. */
export function positionChanges(states: State[]): (number | null)[][] {
  return states.map((state, t) => state.map((row, position) => {
    const before = t ? states[t - 1][position] : null, norm = before && squaredNorm(before);
    return before && norm ? Math.sqrt(squaredDistance(row, before) / norm) : null;
  }));
}

/** ‖a_t − b_t‖ / ‖a_t‖ of every iteration that both traces have; null where the states differ in shape. */
export function distances(a: State[] | null, b: State[] | null): (number | null)[] {
  if (!a || !b) return [];
  return a.slice(0, b.length).map((state, t) => {
    if (state.length !== b[t].length || state[0].length !== b[t][0].length) return null;
    const norm = state.reduce((sum, row) => sum + squaredNorm(row), 0);
    return norm ? Math.sqrt(state.reduce((sum, row, i) => sum + squaredDistance(row, b[t][i]), 0) / norm) : null;
  });
}

/** Eigenvalues and eigenvectors (columns) of a symmetric matrix, by Jacobi rotations. */
export function eigen(matrix: number[][]): { values: number[]; vectors: number[][] } {
  const n = matrix.length, a = matrix.map((row) => [...row]);
  const v = a.map((_, i) => a.map((_, j) => Number(i === j)));
  for (let sweep = 0; sweep < 30; sweep++) {
    let off = 0, diagonal = 0;
    for (let p = 0; p < n; p++) { diagonal += a[p][p] ** 2; for (let q = p + 1; q < n; q++) off += a[p][q] ** 2; }
    if (off <= 1e-18 * diagonal) break;
    for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) {
      if (a[p][q] === 0) continue;
      const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
      const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.hypot(theta, 1)), c = 1 / Math.hypot(t, 1), s = t * c;
      for (let k = 0; k < n; k++) [a[k][p], a[k][q]] = [c * a[k][p] - s * a[k][q], s * a[k][p] + c * a[k][q]];
      for (let k = 0; k < n; k++) [a[p][k], a[q][k]] = [c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]];
      for (let k = 0; k < n; k++) [v[k][p], v[k][q]] = [c * v[k][p] - s * v[k][q], s * v[k][p] + c * v[k][q]];
    }
  }
  return { values: a.map((row, i) => row[i]), vectors: v };
}

export interface Projection {
  points: Point[];
  /** Share of the variance that each of the two axes shows. */
  shares: Point;
}

/** Projects states onto their first two principal components, from the matrix of inner products of the centred states. */
export function project(states: State[]): Projection | null {
  const rows = states.map((state) => state.flat()), n = rows.length;
  if (n < 2 || rows.some((row) => row.length !== rows[0].length)) return null;
  const mean = rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / n);
  const centred = rows.map((row) => row.map((x, i) => x - mean[i]));
  const { values, vectors } = eigen(centred.map((a) => centred.map((b) => a.reduce((sum, x, i) => sum + x * b[i], 0))));
  const total = values.reduce((sum, value) => sum + Math.max(value, 0), 0);
  if (!(total > 0)) return null;
  const [first, second] = values.map((_, i) => i).sort((i, j) => values[j] - values[i]);
  const scale = (i: number) => Math.sqrt(Math.max(values[i], 0));
  return {
    points: vectors.map((row): Point => [row[first] * scale(first), row[second] * scale(second)]),
    shares: [Math.max(values[first], 0) / total, Math.max(values[second], 0) / total],
  };
}
