"""Templates that make a text of several fields: `"{title}\\n\\n{text}"`."""

import string


def template_parts(template: str, needs_field: bool = True) -> list[tuple[str, str]]:
    """(literal, field) pairs of `"{title}\\n\\n{text}"`. Raises ValueError for anything but plain fields, and, where it
    `needs_field`, when there is none."""
    parts: list[tuple[str, str]] = []
    for literal, field, spec, conversion in string.Formatter().parse(template):
        if field is None:
            parts.append((literal, ""))
        elif not field or spec or conversion or not all(part.isidentifier() for part in field.split(".")):
            raise ValueError(f"template {template!r}: write fields as {{name}} or {{outer.inner}}")
        else:
            parts.append((literal, field))
    if needs_field and not any(field for _, field in parts):
        raise ValueError(f"template {template!r} names no field")
    return parts
