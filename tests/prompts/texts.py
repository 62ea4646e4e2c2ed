"""Random texts on which two tokenizers may differ."""

import random
import sys

SCRIPTS = ("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", "äöüßéñçøåÀÉÎÕÜ", "абвгдежЖЩЯ", "αβγδωΣς",
           "日本語漢字ひらがなカタカナ한국어", "مرحبا بالعالم", "שלום", "हिन्दी", "ไทย", "🙂🐱👩\u200d🚀🇩🇪👍🏽❤\ufe0f",
           "\u0301\u0308\u0327\u0302\u20e3", "İıẞŐǅßﬁΐ\u1e9e\u0345", "½²³①Ⅷ٣৪", ".,:;!?()[]{}<>|/\\@#$%^&*_-+=~`'\"",
           " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u3000",
           "\u200b\u200c\u200d\u2060\ufeff\u00ad\u061c\u202e", "\x00\x01\x07\x08\x1b\x7f\x80\x9f",
           "\u1100\u1161\u11a8\ufb1d\u2126\u212b\uf900", "\ue000\uffff\U0010ffff\ufffd")
WORDS = ("a photo of a cat", "red apple", "masterpiece", "(best quality:1.2)", "<lora:ink:0.8>", "<|endoftext|>",
         "<|startoftext|>", "<|ENDOFTEXT|>", "<|endoftext", "|>", "it's", "I'M", "they'll've", "don't", "'s", "''s", "we'd",
         "4k", "3.14", "</w>", "cat</w>", "http://example.com/?q=1&r=2", "Pneumonoultramicroscopicsilicovolcanoconiosis",
         "snake_case", "CamelCase", "\r\n", "...", "")


def texts(n: int, seed: int = 0) -> list[str]:
    """n texts: words, scripts and special tokens in all mixtures, random code points, very long words, and nothing."""
    draw = random.Random(seed)

    def code_point() -> str:
        one = draw.randrange(draw.choice((0x80, 0x800, 0x10000, sys.maxunicode + 1)))
        return chr(one) if not 0xD800 <= one < 0xE000 else "?"  # surrogates are no text

    def piece() -> str:
        kind = draw.random()
        if kind < 0.35:
            return draw.choice(WORDS)
        if kind < 0.75:
            script = draw.choice(SCRIPTS)
            return "".join(draw.choice(script) for _ in range(draw.randint(1, 8)))
        if kind < 0.98:
            return "".join(code_point() for _ in range(draw.randint(1, 6)))
        return draw.choice("abcdé日🙂'!") * draw.randint(50, 400)

    return ["", *(draw.choice(("", " ", " ", ", ")).join(piece() for _ in range(draw.randint(1, 8))) for _ in range(n - 1))]
