"""A test rule that runs one file by pytest in the virtual environment of the tree.

Bazel 4's own py_test and sh_test need rule sets that it downloads; this needs none.
"""

def _pytest_test_impl(ctx):
    script = ctx.actions.declare_file(ctx.label.name + ".sh")
    ctx.actions.write(
        script,
        "#!/bin/bash\nexec {} {}\n".format(
            ctx.file._runner.short_path,
            ctx.file.src.short_path,
        ),
        is_executable = True,
    )
    files = [ctx.file.src, ctx.file._runner] + ctx.files.data
    return [DefaultInfo(
        executable = script,
        runfiles = ctx.runfiles(files = files),
    )]

pytest_test = rule(
    implementation = _pytest_test_impl,
    test = True,
    attrs = {
        "src": attr.label(allow_single_file = [".py"], mandatory = True),
        "data": attr.label_list(allow_files = True),
        "_runner": attr.label(
            allow_single_file = True,
            default = "//tools/bazel:run_pytest.sh",
        ),
    },
)
