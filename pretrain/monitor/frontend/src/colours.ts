// Okabe and Ito's colours, told apart with any kind of colour blindness; lighter ones on a dark ground. With more lines
// than colours, the colours come again with the next dash.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b97a00", "#56b4e9"];
const DARK = ["#56b4e9", "#ff8a3d", "#2fc79a", "#e79bc4", "#e6b800", "#8fa8ff"];
const DASHES = [[], [6, 4], [2, 3]];

export type Theme = "light" | "dark";

export function theme(): Theme {
  const chosen = document.documentElement.dataset.theme;
  if (chosen === "light" || chosen === "dark") return chosen;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

export function colour(number: number): string {
  const colours = theme() === "dark" ? DARK : LIGHT;
  return colours[number % colours.length];
}

export function dash(number: number): number[] {
  return DASHES[Math.floor(number / LIGHT.length) % DASHES.length];
}

/** Of a heat map: from dark blue over teal to yellow (cividis), brightness rising throughout. */
const SCALE = [[0, 32, 77], [28, 60, 110], [87, 92, 109], [124, 123, 120], [165, 156, 116], [210, 192, 96], [255, 234, 70]];

export function heat(part: number): [number, number, number] {
  const at = Math.min(1, Math.max(0, part)) * (SCALE.length - 1);
  const low = Math.min(SCALE.length - 2, Math.floor(at));
  return [0, 1, 2].map((i) => Math.round(SCALE[low][i] + (at - low) * (SCALE[low + 1][i] - SCALE[low][i]))) as [number, number, number];
}

export function variable(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
