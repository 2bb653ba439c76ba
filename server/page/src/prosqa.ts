// ProsQA questions: facts such as "Every zumpus is a gorpus.", then "Is Max a gorpus or rompus?".

export interface Facts { edges: [string, string][]; root: string; options: string[] }

const MOST_FACTS = 300;

/** The graph of a ProsQA question; null if the prompt is not one. */
export function readFacts(prompt: string): Facts | null {
  const question = /Is (\w+) an? (\w+) or (?:an? )?(\w+)\?\s*$/.exec(prompt);
  if (!question) return null;
  const edges = [...prompt.matchAll(/(?:Every )?(\w+) is an? (\w+)\./g)].map((m): [string, string] => [m[1], m[2]]);
  return edges.length && edges.length <= MOST_FACTS ? { edges, root: question[1], options: [question[2], question[3]] } : null;
}

function shuffle<T>(items: T[]): T[] {
  const shuffled = [...items];
  for (let i = shuffled.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [shuffled[i], shuffled[j]] = [shuffled[j], shuffled[i]];
  }
  return shuffled;
}

/** Another question with the same graph: persons and concepts are renamed among themselves, the facts and options reordered. */
export function varyQuestion({ edges, root, options }: Facts): string {
  const names = [...new Set(edges.flat())], isPerson = (name: string) => /^[A-Z]/.test(name);
  const renamed = new Map<string, string>();
  for (const group of [names.filter(isPerson), names.filter((name) => !isPerson(name))]) {
    const mixed = shuffle(group);
    group.forEach((name, i) => renamed.set(name, mixed[i]));
  }
  const facts = shuffle(edges).map(([from, to]) => `${isPerson(from) ? "" : "Every "}${renamed.get(from)} is a ${renamed.get(to)}.`);
  const [first, second] = shuffle(options).map((name) => renamed.get(name) ?? name);
  return `${facts.join(" ")} Is ${renamed.get(root) ?? root} a ${first} or ${second}?`;
}
