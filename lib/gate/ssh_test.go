package gate

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/plan"
)

// sshPacket is an unencrypted packet with a message of a kind.
func sshPacket(kind byte, text string) string {
	const padding = 4
	b := binary.BigEndian.AppendUint32(nil, uint32(2+len(text)+padding))
	return string(append(b, padding, kind)) + text + strings.Repeat("\x00", padding)
}

var kexinit = sshPacket(20, "which algorithms")

func TestSSH(t *testing.T) {
	const client, server = "SSH-2.0-client\r\n", "SSH-2.0-server comment\r\n"
	greeting := strings.Repeat("welcome to SSH-land\r\n", 300) // 6.3 kB
	for name, c := range map[string]struct {
		out, in string // what each side sends
		ok      bool
		who     string // is told to have begun with something else
	}{
		"usual":                      {client + kexinit, server + kexinit, true, ""},
		"lines before":               {client + kexinit, "hello\r\n\r\n" + server + kexinit, true, ""},
		"lines with SSH- inside":     {client + kexinit, greeting + server + kexinit, true, ""},
		"bare LF":                    {"SSH-2.0-old\n" + kexinit, "SSH-2.0-old\n" + kexinit, true, ""},
		"server of both versions":    {client + kexinit, "SSH-1.99-server\r\n" + kexinit, true, ""},
		"longest line":               {client + kexinit, "SSH-2.0-" + strings.Repeat("x", 255-10) + "\r\n" + kexinit, true, ""},
		"disconnect at once":         {client + kexinit, server + sshPacket(1, "too many"), true, ""},
		"one byte too long":          {client + kexinit, "SSH-2.0-" + strings.Repeat("x", 255-9) + "\r\n" + kexinit, false, "the host"},
		"endless line":               {client + kexinit, "SSH-2.0-" + strings.Repeat("x", 9<<10), false, "the host"},
		"endless greeting":           {client + kexinit, strings.Repeat("welcome\r\n", 2000) + server, false, "the host"},
		"greeting in one line":       {client + kexinit, strings.Repeat("welcome", 2000), false, "the host"},
		"server of version 1":        {client + kexinit, "SSH-1.5-old\r\n", false, "the host"},
		"no version":                 {client + kexinit, "SSH-\r\n", false, "the host"},
		"no software":                {client + kexinit, "SSH-2.0-\r\n", false, "the host"},
		"control character":          {client + kexinit, "SSH-2.0-a\x00b\r\n", false, "the host"},
		"server of HTTP":             {client + kexinit, strings.Repeat("HTTP/1.1 400 Bad Request\r\n", 800), false, "the host"},
		"server without packets":     {client + kexinit, server + "+OK ready", false, "the host"},
		"client of HTTP":             {"GET / HTTP/1.1\r\n\r\n", server + kexinit, false, "the client"},
		"lines before the client's":  {"hello\r\n" + client + kexinit, server + kexinit, false, "the client"},
		"client of version 1":        {"SSH-1.5-old\r\n", server + kexinit, false, "the client"},
		"client of 1.99 and no more": {"SSH-1.99-\r\n", server + kexinit, false, "the client"},
		"client without packets":     {client + "FLUSHALL\r\n", server + kexinit, false, "the client"},
		"client with a wrong packet": {client + sshPacket(50, "user"), server + kexinit, false, "the client"},
		"client with a huge packet":  {client + "\xff\xff\xff\xff\x04\x14", server + kexinit, false, "the client"},
		"client with half a packet":  {client + "\x00\x00", server + kexinit, false, "the client"},
	} {
		t.Run(name, func(t *testing.T) {
			got := make(chan string, 1)
			sshd := serveTCP(t, func(s *net.TCPConn) {
				// In pieces, late, and as TCP may cut it.
				for i := 0; i < len(c.in); {
					n := min(i+1, len(c.in)-i, 997)
					s.Write([]byte(c.in[i : i+n]))
					if i += n; i < 20 {
						time.Sleep(time.Millisecond)
					}
				}
				closeWrite(s)
				b, _ := io.ReadAll(s)
				got <- string(b)
			})
			g := start(t, []plan.Rule{pin(allowHost("git.test", "ssh", sshd), "127.0.0.1")}, nil, nil)
			_, _, guest := g.connect(hostPort("git.test", sshd))
			for i := 0; i < len(c.out); i++ {
				if _, err := guest.Write([]byte(c.out[i : i+1])); err != nil {
					break
				}
			}
			closeWrite(guest)
			back, _ := io.ReadAll(guest)
			sent := <-got
			e := g.await("close", func(e audit.Event) bool { return e.Event == audit.KindClose })
			if c.ok {
				if sent != c.out || string(back) != c.in || int(e.BytesOut) != len(c.out) || int(e.BytesIn) != len(c.in) {
					t.Errorf("host got %q, guest got %q, log says %+v", sent, back, e)
				}
				return
			}
			denied := g.await("deny", func(e audit.Event) bool { return e.Verdict == audit.Deny })
			if denied.Code != "not_ssh" || !strings.HasPrefix(denied.Reason, c.who+" began with") {
				t.Errorf("%+v", denied)
			}
			// At most what is in order was passed on.
			if c.who == "the client" && sent != "" && sent != client || c.who == "the host" && strings.HasPrefix(c.in, string(back)) == false {
				t.Errorf("host got %q, guest got %q", sent, back)
			}
			if c.who == "the host" && !strings.HasPrefix(c.in, server) && (len(back) > 0 || sent != client && sent != "") {
				t.Errorf("host got %q, guest got %q", sent, back)
			}
		})
	}
}

// Without the host's version line nothing but the client's own gets to it: that
// line alone must not open a way to a service of another kind.
func TestSSHHostFirst(t *testing.T) {
	lines := make(chan string, 1)
	silent := serveTCP(t, func(s *net.TCPConn) {
		b := make([]byte, 1024)
		s.SetReadDeadline(time.Now().Add(patience))
		n, _ := io.ReadFull(s, b[:len("SSH-2.0-x\r\n")])
		s.SetReadDeadline(time.Now().Add(300 * time.Millisecond)) // and nothing more
		m, _ := io.ReadFull(s, b[n:])
		lines <- string(b[:n+m])
	})
	g := start(t, []plan.Rule{pin(allowHost("redis.test", "ssh", silent), "127.0.0.1")}, nil, nil)
	_, _, guest := g.connect(hostPort("redis.test", silent))
	io.WriteString(guest, "SSH-2.0-x\r\n"+kexinit+"SET a b\r\n")
	if got := <-lines; got != "SSH-2.0-x\r\n" {
		t.Errorf("a service that is none of SSH got %q", got)
	}
}

// A client that lets the server speak first, and one that never speaks.
func TestSSHBannerAlone(t *testing.T) {
	sshd := serveTCP(t, func(s *net.TCPConn) {
		io.WriteString(s, "SSH-2.0-server\r\n")
		io.Copy(io.Discard, s)
	})
	g := start(t, []plan.Rule{pin(allowHost("git.test", "ssh", sshd), "127.0.0.1")}, nil, nil)
	_, _, guest := g.connect(hostPort("git.test", sshd))
	line := make([]byte, len("SSH-2.0-server\r\n"))
	if _, err := io.ReadFull(guest, line); err != nil || string(line) != "SSH-2.0-server\r\n" {
		t.Errorf("%q, %v", line, err)
	}
	guest.Close()
	g.await("close", func(e audit.Event) bool { return e.Event == audit.KindClose })
	if i := slices.IndexFunc(g.events(), func(e audit.Event) bool { return e.Verdict == audit.Deny }); i >= 0 {
		t.Errorf("%+v", g.events()[i])
	}
}

// Who is cut off in the middle of a packet, because the other side is none of
// SSH, is not the one that is told of.
func TestSSHCutOff(t *testing.T) {
	for end, told := range map[error]bool{net.ErrClosed: false, io.EOF: true} {
		src := io.MultiReader(strings.NewReader("\x00\x00"), iotest.ErrReader(end))
		err := (&sshStart{src: src, dst: io.Discard, who: "the client"}).firstPacket()
		var r *Refusal
		if errors.As(err, &r) != told {
			t.Errorf("%v in a packet: %v", end, err)
		}
	}
}
