"""Texts as a model or a stranger's file may hold them, and a reader that sees what became of them
on a page.
"""

import html.parser

TEXTS = [
    "<script>document.title = 'run'</script>",
    "<img src=x onerror=alert(1)>",
    "</td></tr></table><h1>out</h1>",
    '" onmouseover="alert(1)',
    "&lt;b&gt; &amp;",
    "[click](javascript:alert(1))",
    "](javascript:alert(1))",
    "![seen](http://example.org/pixel.png)",
    "http://example.org www.example.org <http://example.org> me@example.org",
    "cell | another | third",
    "``` `code` ```",
    "`````",
    "$\\frac{$ \\x",
    "# heading",
    "- item",
    "1. item",
    "*bold* _em_ ~~gone~~ $x^2$ @team #1",
    "\\| \\` \\",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    " \t=1+1",
    "\r=1+1",
    "\uff1d1+1",
    "a;=1+1",
    '"=1+1"',
    "two\nlines\r\nand more",
    "\u2028line\u2029separators\x0b\x0c\x85",
    "\x1b[31mred\x1b[2J\x1b]0;title\x07",
    "\x00\x08\x7f",
    "\u202eright to left\u200b\ufeff",
    "\ud800 half \udfff",
    "漢字 🙂 é",
    "<!-- --> ]]> <?php ?> <![CDATA[x]]>",
    "{{7*7}} ${7*7} <%= 7 %>",
    "a" * 3000,
]

TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "p",
    "pre",
    "img",
    "div",
    "table",
    "tr",
    "th",
    "td",
    "thead",
    "tbody",
    "code",
}
ATTRIBUTES = {"class", "alt", "lang", "charset", "name", "content", "http-equiv", "style", "src"}


class Read(html.parser.HTMLParser):
    """What a browser would see: tags with their attributes, and the text of each."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data

    def of(self, tag: str) -> list[str]:
        return [
            text.strip()
            for (name, _), text in zip(self.tags, self.texts, strict=True)
            if name == tag
        ]

    def harmless(self) -> bool:
        source = lambda x: (
            x.get("src", "a.svg") in ("a.svg", "report.svg")
            or x["src"].startswith("data:image/svg+xml;base64,")
        )
        return all(tag in TAGS and x.keys() <= ATTRIBUTES and source(x) for tag, x in self.tags)
