from gqsac.cli import main

main()
