from extend.cli import main

main(prog_name="extend")
