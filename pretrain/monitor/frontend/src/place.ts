// The pages of a run, and the addresses they have behind the #.
export const PAGES = ["run", "data", "dynamics", "system", "control"] as const;
export type PageName = (typeof PAGES)[number];

export function link(page: PageName, run: string): string {
  return `#/${page}?run=${encodeURIComponent(run)}`;
}
