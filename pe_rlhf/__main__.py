from pe_rlhf.cli.main import main

main()
