"""Reads a page as a browser would find its parts."""

from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "rect", "line", "polyline", "polygon"}


class Page(HTMLParser):
    """Checks that elements nest, and collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def loads(self) -> list[str]:
        """What it would load from elsewhere."""
        return [v for k, v in self.attributes if k in ("src", "href") or "http" in (v or "")]
