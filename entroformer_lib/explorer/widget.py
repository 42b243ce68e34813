"""The attention explorer as a widget of Jupyter: its JavaScript asks, Python answers.

server = RowServer(load_model("blocks-parallel"), "photo.png")
Explorer(server, row=12, column=20)
"""

import base64
import html
import traceback
import uuid

import anywidget
import traitlets
from IPython.display import HTML, display

from entroformer_lib.errors import UserError
from entroformer_lib.explorer.answers import Answers, packed
from entroformer_lib.explorer.script import STYLE, script
from entroformer_lib.inspection.panels import attention_panel, offered_ks, own_k, telling_layer

# JupyterLab shows the widget once it has drawn, else the still picture above it: without a kernel it draws nothing, and
# a dead widget has no elements inside.
ONE_OF_BOTH = """<style>
.jp-OutputArea-child:has(.ef-still):has(+ .jp-OutputArea-child .ef-explorer canvas) { display: none; }
.jp-OutputArea-child:has(.ef-still) + .jp-OutputArea-child:has(> .jupyter-widgets:not(:has(*))) { display: none; }
</style>"""


class Explorer(anywidget.AnyWidget):
    """Shows one picture through one or two models.

    `explorer.selection` is what is chosen; setting it, or `explorer.select(row=3, column=4)`, moves the widget. Beside
    the widget stands a still picture of its last view, or at first a figure of what it begins with; a saved notebook
    shows that where no kernel runs.

    Args:
        server: of one picture and model, see `server_of`.
        other: of the same picture and another model, or None; it is shown beside the first.
        selection: where to begin: any of row, column, slice, layer, head (-1: mean), k (0: dense), mode and so on, as
            "copy as Python" in the widget writes them.

    Raises:
        AttentionError: the two servers do not have the same grid, or not the same picture.
    """

    _esm = script()
    _css = STYLE.read_text("utf-8")
    meta = traitlets.Dict().tag(sync=True)
    selection = traitlets.Dict().tag(sync=True)
    still = traitlets.Dict().tag(sync=True)  # {"picture": data URL, "caption"}, sent by the browser

    def __init__(self, server, other=None, **selection):
        self.answers = Answers(server, other)
        super().__init__(meta=self.answers.meta(), selection=selection)
        self._stills, self._name = None, f"entroformer-{uuid.uuid4().hex}"
        self.on_msg(self._reply)

    def select(self, **parts) -> None:
        """Changes parts of the selection."""
        self.selection = {**self.selection, **parts}

    def _reply(self, widget, content: dict, buffers: list) -> None:
        """Answers a message: several questions of one view, each by its number."""
        buffers, interrupted = [], {"error": "Python was interrupted."}
        answered = [{"number": asked["number"], "answer": interrupted} for asked in content["asked"]]
        try:
            for row, asked in zip(answered, content["asked"], strict=True):
                row["answer"] = self._answer(asked, buffers)
        finally:
            self.send({"answered": answered}, buffers=buffers)

    def _answer(self, asked: dict, buffers: list[bytes]) -> dict:
        try:
            return packed(self.answers.answer(asked["question"], *asked["values"]), buffers)
        except UserError as error:
            return {"error": str(error)}
        except Exception as error:  # else the browser would wait for an answer
            traceback.print_exc()
            return {"error": f"An error that nobody expected: {type(error).__name__}: {error}"}

    @traitlets.observe("still")
    def _show_still(self, change) -> None:
        if self._stills is not None:
            self._stills.update(HTML(self._still_in_html()))

    def _still_in_html(self) -> str:
        caption = self.still.get("caption", f"Attention explorer of {self._models()}; run this cell to see it.")
        picture = self.still.get("picture") or _first_view(self.answers.servers[0], self.selection)
        shown = f'<img src="{html.escape(picture)}" alt="{html.escape(caption)}" style="max-width:100%">'
        figure = f"{shown if picture else ''}<figcaption>{html.escape(caption)}</figcaption>"
        return f'{ONE_OF_BOTH}<figure class="ef-still" style="margin:0">{figure}</figure>'

    def _models(self) -> str:
        return " and ".join(server.name for server in self.answers.servers)

    def _repr_mimebundle_(self, **keywords):
        self._stills = display(HTML(self._still_in_html()), display_id=self._name)  # one handle for all of them
        data, metadata = super()._repr_mimebundle_(**keywords)
        return {**data, "text/plain": f"Attention explorer of {self._models()}"}, metadata


def _first_view(server, selection: dict) -> str:
    """The map that the explorer begins with, as a data URL; empty where the block is coded without context.

    selection: may hold anything; what does not exist is the nearest that does.
    """
    from entroformer_lib.views.attention_figures import attention_maps

    def chosen(name: str, usual: int, count: int) -> int:
        value = selection.get(name)
        return min(max(value, 0), count - 1) if isinstance(value, int) else usual

    row, column = server.height // 2, server.width // 2
    if not server.has_context((row * server.width + column + 1) * server.slices - 1):
        column += 1 if column + 1 < server.width else -1  # the other pass
    row, column = chosen("row", row, server.height), chosen("column", column, server.width)
    query = (row * server.width + column) * server.slices + chosen("slice", min(1, server.slices - 1), server.slices)
    if not server.has_context(query):
        return ""
    layer = chosen("layer", telling_layer(server), server.layers)
    head = -1 if selection.get("head") == -1 else chosen("head", 0, server.heads)
    k = selection.get("k") if selection.get("k") in offered_ks(server) else own_k(server)
    figure = attention_maps(server.picture, [attention_panel(server, query, layer, head, k)], columns=1)
    return "data:image/png;base64," + base64.b64encode(figure._repr_png_()).decode()
