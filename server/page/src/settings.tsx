// The form of a request's settings. A field that is left empty takes the checkpoint's default.
import type { ComponentChild } from "preact";
import type { Checkpoint, Settings } from "./api";

interface FormProps { checkpoint: Checkpoint; settings: Settings; change: (settings: Settings) => void; title?: string; open?: boolean }

export function SettingsForm({ checkpoint, settings, change, title = "Settings", open = false }: FormProps) {
  const set = (name: keyof Settings, text: string) => {
    const { [name]: _, ...rest } = settings;
    change(text === "" ? rest : { ...rest, [name]: name === "loop_set" ? text : Number(text) });
  };
  const setCriterion = (part: "criterion" | "threshold", text: string) => {
    const { convergence: { [part]: _, ...others } = {}, ...rest } = settings;
    const convergence = text === "" ? others : { ...others, [part]: part === "threshold" ? Number(text) : text };
    change(Object.keys(convergence).length ? { ...rest, convergence } : rest);
  };
  const setNoise = (text: string) => {
    const { initial_noise: _, ...rest } = settings;
    change(text === "" ? rest : { ...rest, initial_noise: { scale: Number(text) } });
  };
  const criterion = settings.convergence?.criterion ?? checkpoint.criterion;
  const threshold = criterion === checkpoint.criterion ? checkpoint.threshold : checkpoint.criteria[criterion];
  const field = (label: string, hint: string, input: ComponentChild) => <label>{label}{input}<small>{hint}</small></label>;
  return (
    <details open={open}>
      <summary>{title}</summary>
      <div class="settings">
        {field("Maximum iterations", `0 turns the loop off; trained with ${checkpoint.trained_iterations}`,
          <input type="number" min={0} max={checkpoint.limits.max_iterations} placeholder={String(checkpoint.max_iterations)}
            value={settings.max_iterations ?? ""} onInput={(event) => set("max_iterations", event.currentTarget.value)} />)}
        {field("Criterion", "what is compared with the threshold after every iteration",
          <select value={settings.convergence?.criterion ?? ""} onChange={(event) => setCriterion("criterion", event.currentTarget.value)}>
            <option value="">{checkpoint.criterion} (default)</option>
            {Object.keys(checkpoint.criteria).filter((name) => name !== checkpoint.criterion).map((name) => <option key={name}>{name}</option>)}
          </select>)}
        {field("Threshold", "the loop stops when the criterion is below it",
          <input type="number" min={0} step="any" placeholder={String(threshold)} value={settings.convergence?.threshold ?? ""}
            onInput={(event) => setCriterion("threshold", event.currentTarget.value)} />)}
        {checkpoint.workspace !== "token" && field("Initial noise", "in the state from which the loop starts, as a multiple of its RMS",
          <input type="number" min={0} max={100} step="any" placeholder="0" value={settings.initial_noise?.scale ?? ""}
            onInput={(event) => setNoise(event.currentTarget.value)} />)}
        {field("Temperature", "0 always writes the likeliest token",
          <input type="number" min={0} max={10} step="any" placeholder="0" value={settings.temperature ?? ""}
            onInput={(event) => set("temperature", event.currentTarget.value)} />)}
        {field("Answer tokens", "maximum number of tokens",
          <input type="number" min={1} max={checkpoint.limits.max_new_tokens} placeholder={String(checkpoint.max_new_tokens)}
            value={settings.max_new_tokens ?? ""} onInput={(event) => set("max_new_tokens", event.currentTarget.value)} />)}
        {checkpoint.models.length > 1 && field("Loop adapter set", "the adapters that the loop runs with",
          <select value={settings.loop_set ?? ""} onChange={(event) => set("loop_set", event.currentTarget.value)}>
            <option value="">{checkpoint.model} (default)</option>
            {checkpoint.models.slice(1).map((name) => <option key={name}>{name}</option>)}
          </select>)}
      </div>
    </details>
  );
}

/** The settings in words. */
export function describeSettings({ max_iterations, convergence, initial_noise, temperature, loop_set, max_new_tokens }: Settings): string {
  const parts = [
    max_iterations === 0 ? "loop off" : max_iterations !== undefined && `at most ${max_iterations} iterations`,
    convergence?.criterion, convergence?.threshold !== undefined && `threshold ${convergence.threshold}`,
    initial_noise?.scale && `initial noise ${initial_noise.scale}`, temperature && `temperature ${temperature}`, max_new_tokens && `${max_new_tokens} tokens`, loop_set && `adapters ${loop_set}`,
  ].filter(Boolean);
  return parts.join(", ") || "default settings";
}
