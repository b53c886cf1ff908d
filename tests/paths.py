"""Names of folders that a user may have, for tests of whatever takes a path."""

NAMES = (
    "a[1]", "a#b", "a?b", "a%b", "a%41b", "a%25", "a\\b", "a|b", "x*", "[!a]", "a b", "a:b", "a{b,c}", "$HOME", "~", "a'b\"c",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian, with a zero-width non-joiner
    "\uff11\uff12\uff13\u3000\uff21",  # full-width digits, an ideographic space
    "\U0001f469\u200d\U0001f680",  # an emoji that two others are joined to
    "e\u0301", "\u202eabc",  # a combining accent; text from right to left
)  # fmt: skip
