"""`evotok-llava demo`: a web page with chat that reads and draws, and the evolution of an image over the levels."""

import argparse

from evotok_plugin.errors import UserError
from llava_ext.commands.options import SharedOptions
from llava_ext.model_folder import open_model


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "demo",
        parents=[shared.model],
        help="a web page to chat, draw and watch an image evolve",
        epilog="The page is for this machine alone unless --host says otherwise; whoever reaches it may use it.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max_upload_mb", type=float, default=10.0, help="of an image file")
    parser.add_argument("--max_pixels", type=int, default=16_000_000, help="of an image")
    parser.add_argument("--teacher", help="SigLIP folder: the evolution tab compares features with its own")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: gradio or matplotlib is not installed, no such model, or the address cannot be used.
    """
    try:
        from llava_ext.serving.page import DemoLimits, build_demo, launch_demo
    except ImportError as error:
        raise UserError(f"the page needs gradio and matplotlib ({error}): pip install 'evotok[demo]'") from error
    from evotok_plugin.evaluation.level_plots import check_plotting
    from evotok_plugin.teacher import load_teacher
    from llava_ext.serving.uploads import UploadLimits

    check_plotting()
    limits = DemoLimits(UploadLimits(arguments.max_upload_mb, arguments.max_pixels))
    opened = open_model(arguments)
    teacher = load_teacher(arguments.teacher).to(opened.model.device) if arguments.teacher else None
    demo = build_demo(opened.model, opened.processor, limits, teacher, opened.name, opened.weights)
    launch_demo(demo, limits, arguments.host, arguments.port)
