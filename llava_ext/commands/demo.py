"""`evotok-llava demo`: serve a web page to chat, draw and rebuild an image level by level."""

import argparse

from evotok_plugin.common.command_parser import examples_of
from evotok_plugin.errors import UserError
from llava_ext.commands.options import SharedOptions, open_selected_model
from llava_ext.model_folder import default_model_folder


def add(commands: argparse._SubParsersAction, shared: SharedOptions) -> None:
    parser = commands.add_parser(
        "demo",
        parents=[shared.model],
        epilog=examples_of(
            "evotok-llava demo                              # the newest model of outputs/, or the included one",
            "evotok-llava demo --model outputs/finetune --port 8080",
            text="By default only this machine can open the page; with --host, anyone who can reach it can use it.",
        ),
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument("--max_upload_mb", type=float, default=10.0, help="largest image file that is accepted, in MB")
    parser.add_argument("--max_pixels", type=int, default=16_000_000, help="largest image that is accepted, in pixels")
    parser.add_argument(
        "--max_total_mb", type=float, default=1024.0, help="size of all files of the page together, in MB"
    )
    parser.add_argument(
        "--teacher", help="SigLIP folder: the evolution tab compares features with those of this teacher"
    )
    parser.set_defaults(run=run)


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
