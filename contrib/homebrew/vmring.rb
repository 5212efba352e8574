# The command `vmring` for Homebrew, on macOS and Linux. From a checkout of this repository:
#
#   brew install --HEAD --formula ./contrib/homebrew/vmring.rb
#
# A tap's owner copies this file to Formula/vmring.rb. With the first release, `url` and `sha256` of
# its tarball go above `head`.
class Vmring < Formula
  desc "Packet rings for virtual machine monitors: bridge, bench and capture networks"
  homepage "https://github.com/vmring/vmring"
  license any_of: ["MIT", "Apache-2.0"]
  head "https://github.com/vmring/vmring.git", branch: "main"

  depends_on "rust" => :build

  def install
    system "cargo", "install", *std_cargo_args(path: "cli")
    system bin/"vmring", "man", "--install", prefix
  end

  def caveats
    on_macos do
      <<~EOS
        The vmnet device needs root (sudo vmring demo --device vmnet) or a binary that is signed
        with the entitlement com.apple.vm.networking. Everything else runs without.
      EOS
    end
  end

  test do
    assert_match version.major_minor.to_s, shell_output("#{bin}/vmring --version") unless head?
    report = shell_output("#{bin}/vmring demo --json --bytes 1M")
    assert_match '"sha256_ok":true', report
  end
end
