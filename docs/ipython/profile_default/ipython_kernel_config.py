"""Figures of code cells have twice the pixels of their size on a page, for sharp screens. Warnings name no file of a kernel."""

c = get_config()  # noqa: F821
c.InlineBackend.figure_formats = {"retina"}
c.InlineBackend.print_figure_kwargs = {"bbox_inches": None}
c.HistoryManager.enabled = False
c.IPKernelApp.log_level = "ERROR"
c.IPKernelApp.exec_lines = [
    '__import__("warnings").formatwarning = lambda message, category, *_, **__: f"{category.__name__}: {message}\\n"'
]
