"""What runs in the process of a model-written program: layers that confine it, each used where the system has it.

Standard library only, and little of it: these modules are imported by a bare interpreter, once for each program.
"""
