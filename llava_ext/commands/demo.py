"""`evotok-llava demo`: serve a web page to chat, draw and rebuild an image level by level."""

import argparse

from evotok_plugin.errors import UserError
from llava_ext.commands.options import open_selected_model
from llava_ext.model_folder import default_model_folder


def run(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: gradio or matplotlib is not installed, the model cannot be opened, the `demo` block of its card
            is wrong, or the address cannot be used.
    """
    try:
        from llava_ext.serving.handlers import DemoLimits
        from llava_ext.serving.page import build_demo, launch_demo
    except ImportError as error:
        raise UserError(f"the page needs gradio and matplotlib ({error}): pip install 'evotok[demo]'") from error
    from evotok_plugin.evaluation.level_plots import check_plotting
    from evotok_plugin.teacher import load_teacher
    from llava_ext.serving.introduction import read_introduction
    from llava_ext.serving.uploads import UploadLimits

    check_plotting()
    limits = DemoLimits(
        UploadLimits(arguments.max_upload_mb, arguments.max_pixels), max_total_mb=arguments.max_total_mb
    )
    arguments.model = arguments.model or default_model_folder()
    introduction = read_introduction(arguments.model)
    opened = open_selected_model(arguments)
    teacher = load_teacher(arguments.teacher).to(opened.model.device) if arguments.teacher else None
    launch_demo(build_demo(opened, limits, teacher, introduction), limits, arguments.host, arguments.port)
