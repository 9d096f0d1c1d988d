"""Texts that tell two encoders apart, and the comparison that `load_encoder` runs before it trusts the fast one.

The fixed part names what tokenizer implementations get wrong: whitespace runs before words, digits and line ends,
contractions in either case, digits outside ASCII, combining marks, joined emoji, control characters, literal special
tokens, very long words. The random part strings such pieces together, because most differences found in practice sit
at a seam between two classes. About 0.1 MB in all, so that the check costs well under 0.2 s.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data_scheduler.encoder import Encoder

_PARAGRAPHS = (
    "The quick brown fox jumps over the lazy dog; it didn't stop, WE'LL see -- they're 42 years late (again).",
    "def f(x: int) -> list[int]:\n\tif x:\n        return [y**2 for y in range(x)]  # 0x1F, 1e-9\r\n\n\n    pass\n",
    "Zażółć gęślą jaźń. Ὀδυσσεύς ἦλθεν. Съешь же ещё этих мягких французских булок. Đây là tiếng Việt.",
    "注意：模型在2024年3月训练完成，共1,024张显卡。日本語のテキストと한국어 문장이 섞여 있다。",
    "الطقس جميل اليوم ١٢٣٤ والسماء صافية. नमस्ते दुनिया १२३ ภาษาไทยไม่มีช่องว่าง ქართული հայերեն",
    "e\u0301 vs é, n\u0303 vs ñ, ﬁ vs fi, Å vs \u212b, ① ② Ⅷ ½ ² ³ ٣ 𝟘 𝟙, ǅ ǆ Ǆ, ß ẞ İ ı",
    "👍🏽 👨‍👩‍👧‍👦 🇫🇷🇯🇵 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️ ☃ \u200d \ufe0f 𝕳𝖊𝖑𝖑𝖔 𐍈 \U0010fffd",
    "a\x00b \x01\x02\x1f\x7f \x85 \xa0 \xad \u200b \u2028 \u2029 \ufeff \ufffd \u3000x \u2003y \v \f",
    '{"key": [1, 2.50, -3e+10, null], "s": "\\u00e9\\n\\t"}  <p class="x">&nbsp;&amp;</p> https://a.b/c?d=e&f=%20',
    "$$\\sum_{i=0}^{n} x_i^2 \\le \\frac{1}{2}$$ #include <stdio.h>\n#define X(a,b) ((a)##b) /* ... */ //////// ====",
)
_PIECES = (
    *(" " * n for n in (1, 1, 1, 2, 3, 4, 7, 8, 12, 16, 23, 24, 25, 30)),
    "\n", "\n\n", "\r\n", "\r", "\t", "\t\t", "\v", "\f", "\x00", "\x1f", "\x85", "\xa0", "\u2003", "\u3000", "\u2028",
    "a", "foo", "Bar", "HTTPServer", "naïve", "e\u0301", "ñ", "straße", "Ω", "Привет", "漢字", "かな", "한국어", "नमस्ते",
    "1", "42", "1234567", "3.14", "١٢", "²", "½", "Ⅷ", "𝟘",
    "'s", "'S", "'ll", "'LL", "'re", "’s", "'", '"', "``", ".", "...", ",", "!?", ";", "(", ")]", "_", "__x", "\\", "/",
    "#", "=", "==", "->", "--", "<", ">", "|", "<|", "|>", "&", "%", "@", "~",
    "😀", "👨\u200d👩\u200d👧", "\u200d", "\ufeff", "\ufffd",
)  # fmt: skip


def check_texts(special_tokens: Sequence[str] = (), seed: int = 0, seams: int = 600) -> list[str]:
    """The built-in texts, the same for the same arguments.

    `special_tokens` are the tokenizer's own; as text they must never become boundaries, so they are among the pieces.
    """
    specials = [*special_tokens[:16], "<|endoftext|>", "</s>", "<s>", "<eos>"]
    texts = [
        "",
        *_PARAGRAPHS,
        "\n".join(_PARAGRAPHS),
        *specials,
        *(f"a {token}b{token}{token} c" for token in specials),
    ]
    for n in range(1, 31):
        run = " " * n
        texts += [
            run,
            f"{run}x",
            f"x{run}y",
            f"x{run}1",
            f"x{run}.",
            f"x{run}\n{run}y",
            f"\t{run}\t",
            f"é{run}漢{run}'s",
        ]
    texts += ["\n" * n + "x" for n in (3, 9, 40)] + ["x" + "\t" * n + "y" for n in (2, 5, 17)]
    texts += ["ab" * 3000, "é" * 2000, "漢字仮名" * 700, "-" * 3000, "7" * 500, "😀" * 300, ("Aa1_" * 900) + " end"]
    rng = random.Random(seed)
    pieces = [*_PIECES, *specials]
    texts += ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 24))) for _ in range(seams)]
    # Any code point at all except surrogates, which no UTF-8 text can hold.
    code_points = [c for c in (rng.randrange(0x110000) for _ in range(4000)) if not 0xD800 <= c < 0xE000]
    texts += ["".join(map(chr, code_points[i : i + 40])) for i in range(0, len(code_points), 40)]
    texts += ["".join(chr(rng.randrange(0x300)) for _ in range(60)) for _ in range(100)]
    return texts


def first_difference(reference: "Encoder", candidate: "Encoder", texts: Sequence[str]) -> str | None:
    """None when both encoders give the same tokens for every text, otherwise one line with the first difference."""
    expected, expected_offsets = reference.encode_batch(texts)
    got, got_offsets = candidate.encode_batch(texts)
    if np.array_equal(expected_offsets, got_offsets) and np.array_equal(expected, got):
        return None
    for i, text in enumerate(texts):
        want = expected[expected_offsets[i] : expected_offsets[i + 1]]
        have = got[got_offsets[i] : got_offsets[i + 1]]
        if not np.array_equal(want, have):
            at = next(
                (k for k, (a, b) in enumerate(zip(want, have, strict=False)) if a != b), min(len(want), len(have))
            )
            near = slice(max(at - 1, 0), at + 3)
            return f"text {text[:60]!r}: token {at}: {want[near].tolist()} expected, {have[near].tolist()} given"
    return f"{len(texts)} texts gave {len(got_offsets) - 1} results"
