"""Elements of a page, and the one place that turns them into text and escapes what they hold."""

from collections.abc import Iterable, Sequence
from html import escape
from xml.etree.ElementTree import Element

from rdpm_cli.evaluation.report.parts import clean

Content = Element | str | None
VOID = {"img", "meta"}  # elements that hold nothing and are not closed


def el(name: str, /, *children: Content | dict[str, str], cls: str = "", **attributes: str) -> Element:
    """An element. children: elements and text in order, and mappings of attributes that are no Python names."""
    found = Element(name, {key: clean(value) for key, value in attributes.items()})
    if cls:
        found.set("class", cls)
    for child in children:
        if isinstance(child, dict):
            found.attrib.update(child)
        elif isinstance(child, str):
            _append_text(found, clean(child))
        elif child is not None:
            found.append(child)
    return found


def _append_text(parent: Element, text: str) -> None:
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text


def serialised(element: Element) -> str:
    """The HTML of an element. Only the text of `style`, which is never a reader's, stands as it is."""
    attributes = "".join(f' {name}="{escape(value)}"' for name, value in element.attrib.items())
    if element.tag in VOID:
        return f"<{element.tag}{attributes}>"
    text = element.text or ""
    inner = [text if element.tag == "style" else escape(text, quote=False)]
    for child in element:
        inner += [serialised(child), escape(child.tail or "", quote=False)]
    return f"<{element.tag}{attributes}>{''.join(inner)}</{element.tag}>"


def some(element: Element | None) -> list[Element]:
    """An element that may be none, as a list."""
    return [] if element is None else [element]


def section(name: str, title: str, *content: Content) -> Element:
    """A part of the page. name: of its anchor."""
    return el("section", el("h2", title), *content, id=name)


def table(label: str, top: Sequence[Element], rows: Iterable[Element], cls: str = "") -> Element:
    """A table that scrolls by itself where the page is narrow. label: for those who hear it."""
    inner = el("table", el("thead", el("tr", *top)), el("tbody", *rows), cls=cls)
    return el("div", inner, {"aria-label": label, "tabindex": "0"}, cls="scroll", role="region")


def head(*texts: str, numbers: Sequence[str] = ()) -> list[Element]:
    """Cells of a table's head: texts, then those over columns of numbers."""
    left = [el("th", text, scope="col") for text in texts]
    return left + [el("th", text, scope="col", cls="number") for text in numbers]


def small(text: str) -> Element | None:
    """A second line in a cell or caption."""
    return el("span", text, cls="small") if text else None
