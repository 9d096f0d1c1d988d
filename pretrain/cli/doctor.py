"""`headrace doctor`: what works on this machine."""

from typing import Annotated

import typer

from headrace.errors import ExitCode

MARKS = {"ok": "[green]ok[/green]", "off": "[yellow]off[/yellow]", "failed": "[bold red]FAILED[/bold red]"}


def doctor(
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Try our own kernels instead: errors against float64, times beside torch's."),
    ] = False,
) -> None:
    """Say which versions, devices, kernels and optional packages are in use, and try all parts once.

    Leaves with 0 when everything that is required works, else with 2.
    """
    if kernels:
        try_kernels()
        return
    from rich.console import Console
    from rich.markup import escape

    from pretrain.doctor import examine

    console = Console(highlight=False, soft_wrap=True)
    group = ""
    failed = []
    for check in examine():
        if check.group != group:
            group = check.group
            console.print(f"[bold]{group}[/bold]")
        padding = " " * (6 - len(check.state))
        console.print(f"  {MARKS[check.state]}{padding}  {check.name:<19} {escape(check.detail)}")
        if check.state == "failed":
            failed.append(check)
    if failed:
        console.print(f"\n[bold red]{len(failed)} of the required parts do not work:[/bold red]")
        for check in failed:
            console.print(f"  {check.name}: {escape(check.detail)}")
        raise typer.Exit(int(ExitCode.USER_ERROR))
    console.print("\nEverything that is required works.")


def try_kernels() -> None:
    """Each operator's form in use on this machine and why; for those that are built, error and speed by dtype."""
    from headrace.errors import HeadraceError
    from parallel import accelerator
    from parallel.kernels import choice, self_test

    device = accelerator.device().type
    used = choice.available(device)
    results: dict[str, list[self_test.Result]] = {name: [] for name in used}
    for result in self_test.run(device):
        results[result.kernel].append(result)
    for name, found in results.items():
        typer.echo(f"{name}  {used[name]}")
        for each in found:
            typer.echo(
                f"  {each.dtype:<9} largest error {each.error:.1e}, allowed {each.allowed:.1e}; "
                f"torch takes {each.ratio:.2f} times as long"
            )
    wrong = [each for found in results.values() for each in found if not each.passed]
    if wrong:
        named = ", ".join(f"{each.kernel} in {each.dtype}" for each in wrong)
        key = wrong[0].kernel
        raise HeadraceError(f"kernels that are not as near to float64 as they should be: {named}; kernels.{key}=torch")
